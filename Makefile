# make demo [SEED=1]   the whole pipeline on the toy pharmacy: before and after, on two CPU cores
# make test            the test suite
# make seeds           the demo for seeds 0, 1, 2, and CISPO and GSPO beside GRPO (NOTES.md keeps the figures)

SEED ?= 0
PY := .venv/bin/python
# The toy is for CPUs: matrices this small lose to a second thread, and would not fill a GPU.
export OMP_NUM_THREADS := 1
export CUDA_VISIBLE_DEVICES :=
TORCHRUN := .venv/bin/torchrun --standalone --nproc_per_node=2
ROOT := runs/toy$(if $(filter-out 0,$(SEED)),-seed$(SEED))
# Another seed gets a world and runs of its own; seed 0 is what the configs say.
with = $(if $(filter-out 0,$(SEED)),seed=$(SEED) run_dir=$(ROOT)/$(1) model.path=$(ROOT)/world/base \
	data.logs=$(ROOT)/world/train.jsonl data.eval_logs=$(ROOT)/world/test.jsonl data.lexicon=$(ROOT)/world/lexicon.yaml)

.PHONY: demo test seeds world base grpo cispo gspo
.DELETE_ON_ERROR:

demo: base grpo
	@echo
	@$(PY) eval.py --table $(ROOT)/base $(ROOT)/grpo --sessions 3
	@echo
	@echo "model: $(ROOT)/grpo/export   figures: $(ROOT)/grpo/eval.json, graded.jsonl, metrics.jsonl   logs: $(ROOT)/world"

test: .venv/installed
	env -u CUDA_VISIBLE_DEVICES $(PY) -m pytest -q --doctest-modules *.py tests

seeds:
	for seed in 0 1 2; do $(MAKE) base grpo cispo gspo SEED=$$seed || exit 1; done
	for root in runs/toy runs/toy-seed1 runs/toy-seed2; do \
		$(PY) eval.py --table $$root/base $$root/grpo $$root/cispo $$root/gspo || exit 1; done

world: .venv/installed
	$(PY) toy.py --out $(ROOT)/world --seed $(SEED)

base: world
	$(PY) hindsight.py configs/toy/base.yaml $(call with,base)
	$(TORCHRUN) eval.py configs/toy/base.yaml $(call with,base)

grpo cispo gspo: world
	$(PY) hindsight.py configs/toy/$@.yaml $(call with,$@)
	$(TORCHRUN) train_grpo.py configs/toy/$@.yaml $(call with,$@)
	$(TORCHRUN) eval.py configs/toy/$@.yaml $(call with,$@)

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@
