# make demo   train, evaluate and use a small model on real images
# make demo-seg  the same for segmentation
# make test   run the tests
# make app    serve a page with the demos' models on http://127.0.0.1:7860
# make wheel  build dist/: a wheel for every Linux, with CUDA kernels where VRWKV_CUDA=1, and the source distribution
# make bench  time the operators and models on a few shapes
# make roofline  count the CUDA kernels' instructions and bytes, and what they take at best; needs nvcc, no GPU
# make lint   check style and types
# Each builds what it needs: the environment in .venv and the compiled kernels. `make clean` removes all of it.

PYTHON ?= python3
BIN := .venv/bin
# Without a GPU nobody could run the CUDA kernels, which take minutes to compile: ask for them with TORCH_CUDA_ARCH_LIST.
export VRWKV_CUDA ?= $(if $(TORCH_CUDA_ARCH_LIST)$(wildcard /dev/nvidia0),auto,0)
# libgomp's busy waiting makes everything many times slower where other programs want the cores too.
export OMP_WAIT_POLICY ?= PASSIVE
DIGITS := output/demo
DIGITS_CONFIG := configs/classification/vrwkv_nano_digits.yaml
SCENES := output/demo-seg
SCENES_CONFIG := configs/segmentation/vrwkv_detail_nano_digit_scenes.py
SOURCES := setup.py $(wildcard $(foreach kind,cpp h cu cuh,vrwkv/ops/*/*.$(kind)))

CXX_FILES := $(filter-out setup.py,$(SOURCES)) $(wildcard tests/cuda/*.h tests/cuda/*.cpp tests/cuda/*.cu)

.PHONY: build demo demo-seg app test wheel bench roofline lint format clean

build: .venv/installed vrwkv/_C.abi3.so

.venv/installed: requirements-dev.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

vrwkv/_C.abi3.so: .venv/installed $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

# A demo trains again when something that its training runs on has changed; a change elsewhere runs what it concerns.
# X.started marks the start of a run and X.trained its end: in between, an interrupted run goes on.
NETWORKS := vrwkv/_C.abi3.so $(wildcard vrwkv/*.py $(foreach room,runtime layers models ops ops/*,vrwkv/$(room)/*.py))
AFTER_TRAINING := $(addprefix vrwkv/,classification/classifier.py segmentation/draw.py segmentation/files.py \
	segmentation/segment.py)

demo: $(DIGITS)/validation.json $(DIGITS)/predictions.json
	$(BIN)/python demo/show_results.py $(DIGITS)

demo-seg: $(SCENES)/result.json $(SCENES)/overlays.json
	@cat $(SCENES)/result.json
	@echo "result      $(SCENES)/result.json"
	@echo "checkpoint  $(SCENES)/last_checkpoint names it"
	@echo "overlays    $(SCENES)/overlays"

data/digits: demo/make_digits.py | build
data/digit_scenes: demo/make_digit_scenes.py | build
data/digits data/digit_scenes:
	rm -rf $@
	$(BIN)/python $< $@
	touch $@

$(DIGITS).started: $(DIGITS_CONFIG) tools/train.py data/digits $(NETWORKS) \
		$(filter-out $(AFTER_TRAINING),$(wildcard vrwkv/classification/*.py))
$(SCENES).started: $(SCENES_CONFIG) tools/train_segmentor.py data/digit_scenes $(NETWORKS) \
		$(filter-out $(AFTER_TRAINING),$(wildcard vrwkv/segmentation/*.py))
$(DIGITS).started $(SCENES).started:
	rm -rf $(basename $@)
	mkdir -p $(@D)
	touch $@

$(DIGITS).trained: $(DIGITS).started
	$(BIN)/python tools/train.py --config $(DIGITS_CONFIG) --set output=$(DIGITS) --resume
	touch $@

$(DIGITS)/validation.json: $(DIGITS).trained tools/validate.py vrwkv/classification/classifier.py
	$(BIN)/python tools/validate.py --checkpoint $(DIGITS)/best.pth --workers 0 --json > $@.tmp
	mv $@.tmp $@

$(DIGITS)/predictions.json: $(DIGITS).trained tools/predict.py vrwkv/classification/classifier.py
	$(BIN)/python tools/predict.py data/digits/samples/*.png --checkpoint $(DIGITS)/best.pth --json > $@.tmp
	mv $@.tmp $@

$(SCENES).trained: $(SCENES).started
	$(BIN)/python tools/train_segmentor.py $(SCENES_CONFIG) --work-dir $(SCENES) --resume
	touch $@

$(SCENES)/result.json: $(SCENES).trained tools/test_segmentor.py
	$(BIN)/python tools/test_segmentor.py $(SCENES_CONFIG) $$(cat $(SCENES)/last_checkpoint) --json > $@.tmp
	mv $@.tmp $@

$(SCENES)/overlays.json: $(SCENES).trained tools/segment.py $(filter vrwkv/segmentation/%,$(AFTER_TRAINING))
	$(BIN)/python tools/segment.py data/digit_scenes/images/val --config $(SCENES_CONFIG) \
		--checkpoint $$(cat $(SCENES)/last_checkpoint) --out $(SCENES)/overlays --json > $@.tmp
	mv $@.tmp $@

app: $(DIGITS).trained $(SCENES).trained
	$(BIN)/python tools/app.py --examples data/digits/samples --seg-examples data/digit_scenes/images/val

test: build
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The wheel is made from the source distribution: it holds nothing that lies about here, and that one is complete.
wheel: build
	rm -rf dist build/wheel
	$(BIN)/python setup.py --quiet sdist
	VRWKV_NATIVE=1 $(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--wheel-dir build/wheel dist/vrwkv-*.tar.gz
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --wheel-dir dist \
		--exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' build/wheel/vrwkv-*.whl

bench: build
	$(BIN)/python benchmarks/run_ops.py --short --output output/benchmarks
	$(BIN)/python benchmarks/run_models.py --short --output output/benchmarks

roofline: build
	$(BIN)/python tools/cuda_report.py --roofline

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
	rm -rf .venv build dist *.egg-info output data vrwkv/*.abi3.so
