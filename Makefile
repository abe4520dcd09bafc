# make demo   train, evaluate and use a small model on real images
# make demo-seg  the same for segmentation
# make test   run the tests
# make bench  time the operators and models on a few shapes
# make lint   check style and types
# Each builds what it needs: the environment in .venv and the compiled kernels. `make clean` removes all of it.

PYTHON ?= python3
BIN := .venv/bin
# Without a GPU nobody could run the CUDA kernels, which take minutes to compile: ask for them with TORCH_CUDA_ARCH_LIST.
export VRWKV_CUDA ?= $(if $(TORCH_CUDA_ARCH_LIST)$(wildcard /dev/nvidia0),auto,0)
# libgomp's busy waiting makes everything many times slower where other programs want the cores too.
export OMP_WAIT_POLICY ?= PASSIVE
DIGITS := output/vrwkv_nano_digits
SCENES := output/vrwkv_detail_nano_digit_scenes
SCENES_CONFIG := configs/segmentation/vrwkv_detail_nano_digit_scenes.py
SOURCES := setup.py $(wildcard $(foreach kind,cpp h cu cuh,vrwkv/ops/*/*.$(kind)))

CXX_FILES := $(filter-out setup.py,$(SOURCES)) $(wildcard tests/cuda/*.h tests/cuda/*.cpp tests/cuda/*.cu)

.PHONY: build demo demo-seg test bench lint format clean

build: .venv/installed vrwkv/_C.abi3.so

.venv/installed: requirements-dev.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

vrwkv/_C.abi3.so: .venv/installed $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: $(DIGITS)/predictions.json
	$(BIN)/python demo/show_results.py $(DIGITS)

data/digits: | build
	$(BIN)/python demo/make_digits.py $@

$(DIGITS)/validation.json: | build data/digits
	$(BIN)/python tools/train.py --config configs/classification/vrwkv_nano_digits.yaml --resume
	$(BIN)/python tools/validate.py --checkpoint $(DIGITS)/best.pth --workers 0 --json > $@.tmp
	mv $@.tmp $@

$(DIGITS)/predictions.json: $(DIGITS)/validation.json
	$(BIN)/python tools/predict.py data/digits/samples/*.png --checkpoint $(DIGITS)/best.pth --json > $@.tmp
	mv $@.tmp $@

demo-seg: $(SCENES)/overlays.json
	@cat $(SCENES)/result.json; echo
	@echo "result      $(SCENES)/result.json"
	@echo "checkpoint  $(SCENES)/last_checkpoint names it"
	@echo "overlays    $(SCENES)/overlays"

data/digit_scenes: | build
	$(BIN)/python demo/make_digit_scenes.py $@

$(SCENES)/result.json: | build data/digit_scenes
	$(BIN)/python tools/train_segmentor.py $(SCENES_CONFIG) --work-dir $(SCENES) --resume
	$(BIN)/python tools/test_segmentor.py $(SCENES_CONFIG) $$(cat $(SCENES)/last_checkpoint) --json $@

$(SCENES)/overlays.json: $(SCENES)/result.json
	$(BIN)/python tools/segment.py data/digit_scenes/images/val --config $(SCENES_CONFIG) \
		--checkpoint $$(cat $(SCENES)/last_checkpoint) --out $(SCENES)/overlays --json > $@.tmp
	mv $@.tmp $@

test: build
	$(BIN)/python -m pytest

bench: build
	$(BIN)/python benchmarks/run_ops.py --short --output output/benchmarks
	$(BIN)/python benchmarks/run_models.py --short --output output/benchmarks

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build *.egg-info output data vrwkv/*.abi3.so
