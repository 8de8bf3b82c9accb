# Two commands: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo smoke table-full policies policies-answers bench-cpu bench-harness bench-gpu test fuzz lint format clean

help:
	@echo "make demo    train a Dynamic-LLaVA on real images, evaluate it in both harnesses, print the table (10 to 20 min, 2 cores)"
	@echo "make test    run the test suite"
	@echo "make fuzz    its property tests on new cases, TIMES=10 as many"
	@echo "make smoke   every benchmark's miniature through both harnesses, each cell of the table checked (2 min)"
	@echo "make lint    ruff and mypy"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about five minutes; most of it downloads PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch>=2.6" "torchvision>=0.21"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval,demo,train,qlora,serve,dev]"
	@touch $(READY)

demo: setup
	$(PY) -m dynllava_plugin.demo

smoke: setup
	$(PY) -m tests.smoke

# The committed table: every test question instead of a sample (15 minutes behind `make demo` on 2 cores).
table-full: setup
	$(PY) -m dynllava_plugin.demo --full

# Tables and plots as in results/efficiency, results/training and results/harness, of this machine: in $(OUT), and an interrupted run
# goes on where it was (docs/speed.md says how long each line takes). The committed ones: OUT=results, without the cpu*.json of before;
# rows of a GPU beside them join the tables.
OUT ?= outputs/bench
CPU_ROWS = $(OUT)/efficiency/cpu.json
BENCH_CPU = $(PY) -m dynllava_plugin.bench all --resume --device cpu --shape cpu-medium --json $(CPU_ROWS)
bench-cpu: setup
	$(BENCH_CPU) --only prefill --batch 1,4,8 --repeats 7
	$(BENCH_CPU) --only decode --batch 1,4,8 --at 0,1000,2000 --repeats 7
	$(BENCH_CPU) --only prefill --batch 16,32 --mode image_text --repeats 3 --warmup 0
	$(BENCH_CPU) --only decode --batch 16,32 --at 500 --mode image_text --repeats 5
	$(BENCH_CPU) --only batching --batch 1,8 --at 200 --repeats 7
	$(BENCH_CPU) --only nocache --batch 1,8 --at 0,500 --repeats 6 --warmup 0
	$(BENCH_CPU) --only memory --batch 1,8 --at 0,1000,2000
	$(BENCH_CPU) --only score --batch 1,8 --mode image_text --repeats 4
	$(PY) -m dynllava_plugin.bench load --resume --device cpu --shape 12x768x12 --repeats 10 --json $(OUT)/efficiency/cpu_load.json
	$(PY) -m dynllava_plugin.bench report $(CPU_ROWS) $(OUT)/efficiency/cpu_load.json \
		$(wildcard $(OUT)/efficiency/h100_7b.json $(OUT)/efficiency/h100_13b.json) --output $(OUT)/efficiency
	$(PY) -m dynllava_plugin.bench train --resume --device cpu --repeats 3 --json $(OUT)/training/cpu.json
	$(PY) -m dynllava_plugin.bench report $(OUT)/training/cpu.json $(wildcard $(OUT)/training/h100_bench.json) --output $(OUT)/training

# Questions a second in both harnesses, one at a time and in batches (12 minutes on 2 idle cores).
bench-harness: setup
	$(PY) -m dynllava_plugin.bench harness --resume --json $(OUT)/harness/cpu.json --output $(OUT)/harness

# LLaVA-1.5's shapes on one GPU with 80 GB, random weights; rows in $(OUT)/gpu, whole after each.
BENCH_GPU = $(PYTHON) -m dynllava_plugin.bench all --resume --device cuda --dtype bfloat16 --repeats 5
export PYTORCH_CUDA_ALLOC_CONF ?= expandable_segments:True
bench-gpu:
	$(BENCH_GPU) --shape llava-1.5-7b --only prefill --batch 1,4,8,16,32 --path eager,static --json $(OUT)/gpu/7b.json
	$(BENCH_GPU) --shape llava-1.5-7b --only decode --batch 1,8 --at 0,500,1000 --path eager,static --json $(OUT)/gpu/7b.json
	$(BENCH_GPU) --shape llava-1.5-7b --only decode --batch 4,16,32 --at 500 --path static --mode image_text --json $(OUT)/gpu/7b.json
	$(BENCH_GPU) --shape llava-1.5-13b --only prefill,memory --batch 8 --at 1000,2000,4000 --json $(OUT)/gpu/13b.json
	$(BENCH_GPU) --shape llava-1.5-13b --only prefill --batch 1,4,8,16,32 --path eager,static --json $(OUT)/gpu/13b.json
	$(BENCH_GPU) --shape llava-1.5-13b --only decode --batch 1 --at 500 --path eager,static --json $(OUT)/gpu/13b.json
	$(BENCH_GPU) --shape llava-1.5-13b --only decode --batch 4,8,16 --at 500 --path static --mode image_text --json $(OUT)/gpu/13b.json
	$(BENCH_GPU) --shape llava-1.5-13b --only nocache --batch 8 --at 0,500,1000 --json $(OUT)/gpu/13b.json
	$(BENCH_GPU) --shape llava-1.5-7b --only memory,score --batch 1,8 --at 1000,2000 --json $(OUT)/gpu/7b.json
	$(BENCH_GPU) --shape llava-1.5-7b --only decode --batch 1 --at 1000 --path compiled --mode image_text --json $(OUT)/gpu/7b.json

# Every policy on hard scenes at four shares, then at equal equivalent tokens: those of a gate at layer 2 of 6 on 100 tokens, which
# FastV at layer 3 can't reach. Policies before the LLM keep positions, which serves a model trained on one grid better. Of several
# checkpoints the further ones answer under full context and the learned policies. Resumes. The committed rows, LIMIT=600, took 20
# minutes as two processes on 2 cores (docs/policies.md).
LIMIT ?= 2000
TOKENS ?= 60 46.67 40 36.67
INSIDE = full image fastv,k=2 pyramiddrop sparsevlm v2drop dart random
BEFORE = downsample visionzip fastervlm vispruner holov hiprune divprune cdpruner prumerge+
COMPARE = $(PY) -m dynllava_plugin.cli compare --limit $(LIMIT) --repeats 0
policies: setup
	$(if $(CHECKPOINT),,$(error give CHECKPOINT="SEED0 SEED1 SEED2", trainings of tiny-hard as docs/policies.md has them))
	$(COMPARE) --pretrained $(CHECKPOINT) --output results/policies --tasks easy_vqa_hard --keep 0.4 0.2 0.1 0.05 \
		--policies $(INSIDE) fastv $(BEFORE:%=%,positions=original) divprune
	$(COMPARE) --pretrained $(CHECKPOINT) --output results/policies --tasks easy_vqa_hard --tokens $(TOKENS) \
		--policies $(INSIDE) $(BEFORE:%=%,positions=original)

# Long answers with half of the context, by a checkpoint that has learned to describe (`make demo`'s).
policies-answers: setup
	$(COMPARE) --pretrained $(or $(CHECKPOINT),results/demo_work/dynamic_tiny) --output results/policies/answers --tasks easy_vqa_describe --keep 0.5 \
		--policies full image image_text image+random_text image+structure h2o fastv+h2o

# A file's tests stay in one of JOBS processes, each on one core.
JOBS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

# The property tests with TIMES as many cases, drawn anew; a failing one is printed with the line that repeats it. FILES: of these
# only; TIMES=28 FILES=tests/test_matrix.py draws 1,008 configurations of families, policies and batches (five minutes).
TIMES ?= 10
FILES ?=
fuzz: setup
	OMP_NUM_THREADS=1 DYNLLAVA_FUZZ=$(TIMES) $(PY) -m pytest -m hypothesis $(FILES)

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --cache-dir /dev/null  # its cache has passed what a clean run refuses

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
