# make demo [SEED=1]      the whole pipeline on the toy pharmacy: before and after, on two CPU cores
# make table1 [SEEDS=3]   the nine rows of Table 1 on the toy pharmacy; goes on where it was interrupted
# make test               the test suite

SEED ?= 0
SEEDS ?= 1
ROWS ?= base sft dpo grpo no_ra no_rs sum gspo cispo
PY := .venv/bin/python
# The toy is for CPUs: matrices this small lose to a second thread, and would not fill a GPU.
export OMP_NUM_THREADS := 1
export CUDA_VISIBLE_DEVICES :=
ROOT := runs/toy$(if $(filter-out 0,$(SEED)),-seed$(SEED))
# Another seed gets a world and runs of its own; seed 0 is what the configs say.
OVERRIDES := $(if $(filter-out 0,$(SEED)),seed=$(SEED) model.path=$(ROOT)/world/base data.logs=$(ROOT)/world/train.jsonl \
	data.eval_logs=$(ROOT)/world/test.jsonl data.lexicon=$(ROOT)/world/lexicon.yaml)
ROOTS = $(ROOT) $(foreach seed,$(shell seq 1 $(SEEDS)),$(if $(filter-out $(SEEDS),$(seed)),runs/toy-seed$(seed)))

.PHONY: demo table1 test world rows
.DELETE_ON_ERROR:

demo: ROWS = base grpo
demo: SHOW = --sessions 3
demo: rows
	@echo
	@echo "model: $(ROOT)/grpo/export   figures: $(ROOT)/grpo/report.html, eval.json, graded.jsonl   logs: $(ROOT)/world"

table1: rows
	for seed in $$(seq 1 $$(($(SEEDS) - 1))); do $(MAKE) rows SEED=$$seed ROWS="$(ROWS)" || exit 1; done
	$(if $(filter-out 1,$(SEEDS)),$(PY) eval.py --table $(foreach root,$(ROOTS),$(ROWS:%=$(root)/%)))

rows: world
	$(PY) table1.py $(ROWS:%=configs/toy/%.yaml) --nproc 2 --root $(ROOT) $(SHOW) $(OVERRIDES)

world: .venv/installed
	$(PY) toy.py --out $(ROOT)/world --seed $(SEED)

test: .venv/installed
	env -u CUDA_VISIBLE_DEVICES $(PY) -m pytest -q --doctest-modules *.py tests

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@
