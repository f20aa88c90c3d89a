# make demo [SEED=1]      the whole pipeline on the toy pharmacy: before and after, on two CPU cores
# make table1 [SEEDS=3]   the nine rows of Table 1 on the toy pharmacy; goes on where it was interrupted
# make table2             Auto-Prompt behind a server that plays the language models: the base model, poor prompts,
#                         calibrated prompts
# make real LOGS=my.jsonl [SEEDS=3]  the whole way on your own logs: labels, lexicon, a small base model, SFT, GRPO, figures
# make test               all tests; make test-fast: without the slow ones
# make test-extras        the tests that compare with a package of requirements-extras.txt (TRL)
# make soak               the campaigns of tests/ (kills, faulty servers, fuzzed logs, full disks) at full length
# make lint               ruff and mypy (pyproject.toml)
# make bench              ours beside TRL and transformers on this machine's device (about an hour on two cores);
#                         adds lines to bench/results/

SEED ?= 0
SEEDS ?= 1
ROWS ?= base sft dpo grpo no_ra no_rs sum gspo cispo
PY := .venv/bin/python
# The toy is for CPUs: matrices this small lose from a second thread, and would not fill a GPU.
export OMP_NUM_THREADS := 1
export CUDA_VISIBLE_DEVICES :=
TORCHRUN := .venv/bin/torchrun --standalone --nproc_per_node=2
ROOT := runs/toy$(if $(filter-out 0,$(SEED)),-seed$(SEED))
# Another seed gets a world and runs of its own; seed 0 is what the configs say.
OVERRIDES := $(if $(filter-out 0,$(SEED)),seed=$(SEED) model.path=$(ROOT)/world/base data.logs=$(ROOT)/world/train.jsonl \
	data.eval_logs=$(ROOT)/world/test.jsonl data.lexicon=$(ROOT)/world/lexicon.yaml)
ROOTS = $(ROOT) $(foreach seed,$(shell seq 1 $(SEEDS)),$(if $(filter-out $(SEEDS),$(seed)),runs/toy-seed$(seed)))

.PHONY: demo table1 table2 real test test-fast soak test-extras lint bench world rows
.DELETE_ON_ERROR:

demo: ROWS = base grpo
demo: SHOW = --sessions 3
demo: rows
	@echo
	@echo "model: $(ROOT)/grpo/export   figures: $(ROOT)/grpo/report.html, eval.json, graded.jsonl   logs: $(ROOT)/world"

table1: rows
	for seed in $$(seq 1 $$(($(SEEDS) - 1))); do $(MAKE) rows SEED=$$seed ROWS="$(ROWS)" || exit 1; done
	$(if $(filter-out 1,$(SEEDS)),$(PY) eval.py --table $(foreach root,$(ROOTS),$(ROWS:%=$(root)/%)))

# Two GRPO runs whose extractor and grader sit behind a server: with poor prompts, and with these calibrated
# against anchors. All rows are evaluated on the turns and with the grader of the rules source.
T2 := runs/toy/table2
LLM := configs/toy/llm.yaml llm.cache=$(T2)/llm_cache.sqlite train.steps=100 train.eval_every=null
POOR := llm.extractor.prompt=prompts/extractor_poor_toy.md llm.grader.prompt=prompts/grader_poor_toy.md
CALIBRATED := llm.extractor.prompt=prompts/calibrated/extractor.md llm.grader.prompt=prompts/calibrated/grader.md
table2: ROWS = base
table2: rows
	$(PY) -m toy.anchors --world runs/toy/world --config configs/toy/base.yaml --out $(T2)/anchors
	set -e; $(PY) -m toy.llm_server --lexicon runs/toy/world/lexicon.yaml --port 8377 & \
	trap "kill $$!" EXIT; sleep 3; \
	for type in extractor grader; do \
		$(PY) autoprompt.py $(LLM) $(POOR) run_dir=$(T2)/calibrate type=$$type \
			anchors=$(T2)/anchors/$$type.jsonl || exit 1; \
	done; \
	for row in original calibrated; do \
		if [ $$row = calibrated ]; then prompts="$(CALIBRATED)"; else prompts="$(POOR)"; fi; \
		$(PY) hindsight.py $(LLM) $$prompts run_dir=$(T2)/train_$$row || exit 1; \
		$(TORCHRUN) train_grpo.py $(LLM) $$prompts run_dir=$(T2)/train_$$row || exit 1; \
		$(PY) hindsight.py configs/toy/base.yaml run_dir=$(T2)/$$row || exit 1; \
		$(TORCHRUN) eval.py configs/toy/base.yaml run_dir=$(T2)/$$row model.path=$(T2)/train_$$row/export || exit 1; \
	done
	$(PY) eval.py --table runs/toy/base $(T2)/original $(T2)/calibrated

# One lexicon for all seeds (a person may edit that of seed 0); labels, base model and runs of each seed are its own.
OWN := runs/own$(if $(filter-out 0,$(SEED)),-seed$(SEED))
OWN_KEYS = "data.logs=$(LOGS)" seed=$(SEED) data.turns=$(OWN)/turns data.lexicon=$(OWN)/lexicon.yaml
real: .venv/installed
	@test -n "$(LOGS)" || { echo "error: name your logs: make real LOGS=my.jsonl (docs/walk.md)" >&2; exit 2; }
	$(PY) hindsight.py configs/own.yaml $(OWN_KEYS) run_dir=$(OWN)
	$(if $(filter-out 0,$(SEED)),cp runs/own/lexicon.yaml $(OWN),test -f $(OWN)/lexicon.yaml || \
		$(PY) -m corpora.lexicon mine configs/own.yaml $(OWN_KEYS) run_dir=$(OWN))
	$(PY) -m corpora.base configs/own.yaml $(OWN_KEYS) model.path=$(OWN)/base_model
	$(PY) table1.py configs/own/base.yaml configs/own/sft.yaml --nproc 2 --root $(OWN) $(OWN_KEYS) \
		model.path=$(OWN)/base_model
	$(PY) table1.py configs/own/grpo.yaml --nproc 2 --root $(OWN) $(OWN_KEYS) model.path=$(OWN)/sft/export
	$(PY) eval.py --table $(OWN)/base $(OWN)/sft $(OWN)/grpo --sessions 3
	for seed in $$(seq 1 $$(($(SEEDS) - 1))); do \
		$(MAKE) real SEEDS=1 SEED=$$seed LOGS="$(LOGS)" || exit 1; done
	$(if $(filter-out 1,$(SEEDS)),$(PY) eval.py --table $(foreach seed,$(shell seq 0 $$(($(SEEDS) - 1))), \
		$(addprefix runs/own$(if $(filter-out 0,$(seed)),-seed$(seed))/,base sft grpo)))

rows: world
	$(PY) table1.py $(ROWS:%=configs/toy/%.yaml) --nproc 2 --root $(ROOT) $(SHOW) $(OVERRIDES)

world: .venv/installed
	$(PY) -m toy.world --out $(ROOT)/world --seed $(SEED)

# On a machine with a GPU its tests run apart: all others are tests of the CPU path, with CUDA hidden.
PYTEST := $(PY) -m pytest -q
ALL_CORES := -n auto
CODE := --doctest-modules *.py toy corpora tests

test: .venv/dev
	$(PYTEST) $(ALL_CORES) $(CODE)
	! command -v nvidia-smi > /dev/null || env -u CUDA_VISIBLE_DEVICES $(PYTEST) -m gpu tests

test-fast: .venv/dev
	$(PYTEST) $(ALL_CORES) -m "not slow" $(CODE)

soak: .venv/dev
	$(PYTEST) -s -m soak --soak tests

test-extras: .venv/dev .venv/extras
	$(PYTEST) -m extras tests

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/mypy

# All cores and the GPU, if there is one, are used.
BENCH := env -u CUDA_VISIBLE_DEVICES -u OMP_NUM_THREADS $(PY) -m bench
PROMPTS ?= 600 256 64 2000
bench: .venv/extras
	$(BENCH).rollout
	$(BENCH).train_tokens --groups 2 --sizes 1,2,5,10,20
	for prompt in $(PROMPTS); do for responses in 8 16 0; do \
		$(BENCH).grpo_step --prompt $$prompt --peer-batch $$responses || exit 1; done; done

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv/dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install -c requirements.txt -r requirements-dev.txt
	touch $@

# The constraints keep another torch out.
.venv/extras: .venv/installed requirements-extras.txt
	.venv/bin/pip install -c requirements.txt -r requirements-extras.txt
	touch $@
