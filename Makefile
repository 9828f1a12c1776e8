# The two commands of the README, and what CI runs. Everything happens in .venv; nothing outside is touched.
#
# TORCH_INDEX: a package index with a CPU build of torch, where the default one would bring CUDA:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TFLITE ?= .venv-tflite
LEGACY ?= .venv-legacy
FUZZ ?= .venv-fuzz
FUZZ_INPUTS ?= 5000000
PEERS ?= .venv-peers
RAY ?= .venv-ray
CRYPTO ?= .venv-crypto
TORCH_INDEX ?=
BUNDLES ?= out/demo
BIN = $(VENV)/bin
DOCUMENTED = ensembler ensembler.protocol ensembler.transport ensembler.edge_runtime ensembler.cloud_runtime \
	ensembler.training ensembler.privacy ensembler.export ensembler.crypto
PIP = $(BIN)/pip --disable-pip-version-check
CONSTRAINTS = constraints/main.txt
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slow test-tflite test-legacy test-ray test-crypto test-arm test-image lint docs bench load \
	speed peers ray results cifar wire privacy presets faces reports bench-crypto frontier operators paper-cut \
	separation tables models fuzz soak clean

demo: $(INSTALLED)
	$(BIN)/ensembler demo --out out/demo

# A process for every core and one thread each: most tests have use for no more. By file, since a file's tests share
# what they made.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# The tests that take longest: whole trainings, exports and examples, killed half-way and resumed.
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m slow --timeout 900

# What converts to TFLite is 1 GB beside torch and pins other versions, so it has an environment of its own.
test-tflite: $(TFLITE)/.installed
	OMP_NUM_THREADS=1 $(TFLITE)/bin/python -m pytest tests/test_tflite.py tests/test_backends.py

# The runtime of 32-bit boards goes with NumPy 1 alone.
test-legacy: $(LEGACY)/.installed
	$(LEGACY)/bin/python -m pytest tests/test_backends.py

# Several machines: a real Ray cluster of two nodes on this one. Ray is 0.5 GB and its cluster takes the cores to itself;
# it does not wait for the processes that it ends, which Python warns of.
test-ray: $(RAY)/.installed
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -W ignore::ResourceWarning tests/test_engine.py
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -W ignore::ResourceWarning tests/cluster

# Crypto-clear inference with its real engine, whose release goes with what the other tests use.
test-crypto: $(CRYPTO)/.installed
	OMP_NUM_THREADS=1 $(CRYPTO)/bin/python -m pytest tests/test_crypto.py

# Packages for three boards, installed and run on emulated ones; as root on Debian or its like, with qemu-user-static and
# mmdebstrap. Where boards cannot be emulated the tests are skipped and say why.
test-arm: $(TFLITE)/.installed $(LEGACY)/.installed
	ENSEMBLER_LEGACY_PYTHON=$(abspath $(LEGACY))/bin/python OMP_NUM_THREADS=1 \
		$(TFLITE)/bin/python -m pytest -n 2 --dist loadscope --timeout 1200 --durations 10 tests/arm

# The steps of deploy/Dockerfile without Docker, in fresh environments: a minute, and a package index.
test-image: $(INSTALLED)
	$(BIN)/python -m pytest tests/image

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/link_view.py
	$(BIN)/mypy

# The API reference, from the docstrings: out/docs/index.html.
docs: $(INSTALLED)
	$(BIN)/pdoc --docformat google --output-directory out/docs $(DOCUMENTED)

# What is there is not made again, and what was killed is not taken for it. $(call trained,NAME,OPTIONS) makes runs/NAME,
# or goes on with it where its training was stopped; $(call exported,NAME,OPTIONS) makes out/NAME, whose client comes last.
trained = test -f runs/$(1)/summary.json || if test -f runs/$(1)/config.json; then \
	$(BIN)/ensembler train --resume runs/$(1); else $(BIN)/ensembler train $(2) --out runs/$(1); fi
exported = test -f out/$(1)/client/manifest.json || $(BIN)/ensembler export runs/$(1) --out out/$(1) $(2)

# Figures for docs/results/, minutes each; the goal and the command stand beside every figure. The recorded ones were
# taken with BUNDLES=out/cifar10_slim, which `make cifar` makes.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py
	test -d $(BUNDLES)/client || $(BIN)/ensembler demo --out $(BUNDLES)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/overhead.py $(BUNDLES) --name demo
	$(BIN)/python benchmarks/device.py $(BUNDLES)
	$(BIN)/python benchmarks/timing.py

# The server under load, and beside other servers; nothing else should run meanwhile.
load: $(INSTALLED) peers
	$(BIN)/python benchmarks/bundles.py
	$(BIN)/python benchmarks/load.py
	$(PEERS)/bin/python benchmarks/side_by_side.py

# The paper's Table III over a link of known rate: Standard CI, Ensembler, and ours. As root, with iproute2; ten minutes.
speed: $(INSTALLED)
	$(BIN)/python benchmarks/table3.py
	$(BIN)/python benchmarks/occupancy.py
	$(BIN)/python benchmarks/integers.py

# The other servers have an environment of their own; none of them is a dependency.
peers: $(PEERS)/.installed
# A machine of a Ray cluster killed under load, again and again; minutes.
ray: $(RAY)/.installed
	test -d $(BUNDLES)/client || $(BIN)/ensembler demo --out $(BUNDLES)
	$(RAY)/bin/python benchmarks/ray_nodes.py $(BUNDLES)

# The slim net on CIFAR-10, an hour on two cores. CIFAR10=PATH of the authors' archive, or an npz pair.
cifar: $(INSTALLED)
	$(BIN)/python benchmarks/cifar10_slim.py --data "$(CIFAR10)"

# Fewer bits on the wire, and a bottleneck: two hours on two cores. CIFAR10 as above.
wire: $(INSTALLED)
	$(BIN)/python benchmarks/wire.py --data "$(CIFAR10)"

# What a server reads of the clients of `make wire` and of a third one for the same server; hours on two cores.
SLIM = runs/wire/bits_8
AUDITED = $(BIN)/python benchmarks/audit.py $(foreach i,0 1 2,$(SLIM)_$(i)=out/wire/bits_8_$(i)/client)
privacy: $(INSTALLED)
	$(call trained,wire/bits_8_2,--data "$(CIFAR10)" --arch resnet10_slim -N 4 -P 2 --epochs 4 --stage1 $(SLIM)_0)
	$(call exported,wire/bits_8_2,--plaintext --server-bundle out/wire/bits_8_0/server)
	$(AUDITED)
	$(AUDITED) --attack shadow-single --attack shadow-calibrated --attack shadow-adaptive
	$(AUDITED) --attack known-pairs-10 --attack known-pairs-1000 --attack distribution-matching-64
	$(BIN)/python benchmarks/audit.py $(foreach i,0 2,$(SLIM)_$(i)=out/wire/bits_8_$(i)/client) --attack other-device \
		--attack mla --attack mla-prior --other-device out/wire/bits_8_1/client
	$(BIN)/python benchmarks/audit.py $(SLIM)_0=out/wire/bits_8_0/client --attack distribution-matching-critic \
		--attack generative-prior --attack distribution-matching-blind

# The presets: three clients of one server each, three undefended nets, and what attacks read. Hours on two cores.
PRESET = --data "$(CIFAR10)" --precision fast --epochs-stage1 8
TERSE = -N 4 -P 2 --epochs-stage3 10 --teacher runs/none_0
STRONG = --arch resnet10_half --preset strong $(TERSE)
BALANCED = --arch resnet10_half --preset balanced $(TERSE)
OBFUSCATED = --arch resnet10_half --preset obfuscate -N 4 -P 2 --epochs-stage3 8
PUBLISH = --plaintext --max-accuracy-drop 1
presets: $(INSTALLED)
	for i in 0 1 2; do $(call trained,none_$$i,$(PRESET) --arch resnet10_half --defense none --seed $$i) || exit 1; done
	$(call trained,local,$(PRESET) --arch resnet10_slim --defense none --teacher runs/none_0)
	$(call trained,strong_0,$(PRESET) $(STRONG) --jobs 2)
	for i in 1 2; do $(call trained,strong_$$i,$(PRESET) $(STRONG) --stage1 runs/strong_0) || exit 1; done
	$(call exported,strong_0,$(PUBLISH))
	for i in 1 2; do $(call exported,strong_$$i,$(PUBLISH) --server-bundle out/strong_0/server) || exit 1; done
	$(BIN)/python benchmarks/presets.py strong $(foreach i,0 1 2,--victim runs/strong_$(i)=out/strong_$(i)/client) \
		--local runs/local --server out/strong_0/server $(foreach i,0 1 2,--undefended runs/none_$(i))
	$(call trained,local_half,$(PRESET) --arch benchmarks.nets:resnet10_22 --head-end stem --defense none \
		--teacher runs/none_0)
	$(call trained,bal_0,$(PRESET) $(BALANCED) --jobs 2)
	for i in 1 2; do $(call trained,bal_$$i,$(PRESET) $(BALANCED) --stage1 runs/bal_0) || exit 1; done
	$(call exported,bal_0,$(PUBLISH))
	for i in 1 2; do $(call exported,bal_$$i,$(PUBLISH) --server-bundle out/bal_0/server) || exit 1; done
	$(BIN)/python benchmarks/presets.py balanced $(foreach i,0 1 2,--victim runs/bal_$(i)=out/bal_$(i)/client) \
		--local runs/local_half --server out/bal_0/server $(foreach kind,oracle devices servers,--kind $(kind)) \
		$(foreach i,0 1 2,--undefended runs/none_$(i))
	$(call trained,obf_0,$(PRESET) $(OBFUSCATED) --jobs 2)
	for i in 1 2; do $(call trained,obf_$$i,$(PRESET) $(OBFUSCATED) --stage1 runs/obf_0) || exit 1; done
	$(call exported,obf_0,$(PUBLISH))
	for i in 1 2; do $(call exported,obf_$$i,$(PUBLISH) --server-bundle out/obf_0/server) || exit 1; done
	$(BIN)/python benchmarks/presets.py obfuscate $(foreach i,0 1 2,--victim runs/obf_$(i)=out/obf_$(i)/client) \
		--server out/obf_0/server $(foreach kind,oracle devices servers,--kind $(kind)) \
		$(foreach i,0 1 2,--undefended runs/none_$(i))

# The same on faces of 64x64 pixels, five clients and five undefended nets; hours on two cores. FACES=npz:TRAIN,TEST
FACE = --data "$(FACES)" --arch resnet10_half --precision fast --batch-size 64 --epochs-stage1 16
FIVE = 0 1 2 3 4
faces: $(INSTALLED)
	for i in $(FIVE); do $(call trained,faces_none_$$i,$(FACE) --defense none --seed $$i) || exit 1; done
	for i in $(FIVE); do $(call trained,faces_strong_$$i,$(FACE) --preset strong -N 4 -P 2 --epochs-stage3 20 \
		--teacher runs/faces_none_0 $$(test $$i = 0 || echo --stage1 runs/faces_strong_0)) || exit 1; done
	for i in $(FIVE); do $(call exported,faces_strong_$$i,$(PUBLISH) \
		$$(test $$i = 0 || echo --server-bundle out/faces_strong_0/server)) || exit 1; done
	$(BIN)/python benchmarks/presets.py faces_strong $(foreach i,$(FIVE),--victim runs/faces_strong_$(i)=out/faces_strong_$(i)/client) \
		--server out/faces_strong_0/server $(foreach i,$(FIVE),--undefended runs/faces_none_$(i))

# A report of each preset on the built-in images, which anybody may look at; half an hour on two cores.
ATTACKED = misaligned-decoder known-pairs-100 frames-8 distribution-matching shadow-informed
reports: $(INSTALLED)
	for preset in obfuscate balanced strong; do \
		$(call trained,dm_$$preset,--data demo --arch resnet10_slim --preset $$preset -N 4 -P 2 --epochs 6 \
			--precision fast) || exit 1; \
		$(BIN)/ensembler audit runs/dm_$$preset --budget quick $(foreach name,$(ATTACKED),--attack $(name)) \
			--out docs/results/audit-$$preset.html || exit 1; done

# Crypto-clear inference: a small net on 100 images, C2PI's Table II with both VGGs, and an Ensembler behind the boundary;
# as root for the links. Two hours on two cores, most of them training; what is there is not made again.
PLAIN = $(PRESET) --defense none
bench-crypto: BIN = $(CRYPTO)/bin
bench-crypto: $(CRYPTO)/.installed
	$(call trained,none_0,$(PLAIN) --arch resnet10_half --seed 0)
	for net in vgg16 vgg19; do $(call trained,$$net,$(PLAIN) --epochs 5 --arch $$net) || exit 1; done
	$(call trained,hidden,$(PRESET) --arch resnet10_slim -N 4 -P 2 --epochs 4 --noise-std 0 --head-for all)
	$(BIN)/python benchmarks/crypto.py runs/none_0 --boundary 4 --boundary 5 --boundary 8 --boundary 12
	for net in vgg16 vgg19; do for ssim in 0.2 0.3; do test -f out/boundary_$${net}_$$ssim.json || { \
		$(BIN)/ensembler boundary runs/$$net --out out/boundary_$$net.json --ssim $$ssim --layers 6,7,8,9,10,11 \
			--visited-only --steps 250 --images 300 && \
		cp out/boundary_$$net.json out/boundary_$${net}_$$ssim.json; } || exit 1; done; done
	$(BIN)/python benchmarks/crypto_table2.py vgg16=runs/vgg16 vgg19=runs/vgg19 \
		$(foreach net,vgg16 vgg19,$(foreach ssim,0.2 0.3,--found $(net)=out/boundary_$(net)_$(ssim).json))
	$(BIN)/python benchmarks/crypto_ensemble.py runs/hidden

# Heads that are unlike earlier ones, by cosine or after the best linear map, on the built-in images;
# hours on a core, one with --budget quick.
separation: $(INSTALLED)
	$(BIN)/python benchmarks/separation.py --precision fast

# Codes of 2 and 4 bits at the paper's cut, in full width; three hours on a core.
paper-cut: $(INSTALLED)
	$(BIN)/python benchmarks/paper_cut.py --data "$(CIFAR10)" --precision fast

# Operators who are each sent channels of their own, and one of them under the oracle; two hours on a core.
operators: $(INSTALLED)
	$(BIN)/python benchmarks/operators.py --data "$(CIFAR10)" --precision fast --epochs 6

# One lever at a time under the oracle; hours on two cores, and what is there is not made again.
frontier: $(INSTALLED)
	$(BIN)/python benchmarks/frontier.py --data "$(CIFAR10)"

# The papers' tables at a small scale, cell by cell into docs/results/tables and docs/reproduction.md; many hours on two
# cores. What is there is not made again. CIFAR10 as above.
tables: $(INSTALLED)
	$(BIN)/python benchmarks/paper_tables.py --scale small --data cifar10="$(CIFAR10)"

# Every architecture at several cuts; half an hour.
models: $(INSTALLED)
	$(BIN)/python benchmarks/models.py

# Every decoder under a coverage-guided fuzzer: half an hour of a core of its own. atheris is for Python 3.11 to 3.13.
fuzz: $(FUZZ)/.installed
	OMP_NUM_THREADS=1 $(FUZZ)/bin/python benchmarks/fuzzing.py --inputs $(FUZZ_INPUTS) --keep

# An hour of half load on `ensembler serve`: memory and descriptors stay flat. After `make demo`.
soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py $(BUNDLES)

results: $(INSTALLED)
	$(BIN)/python tools/print_results.py

# torch comes first and alone, so that its index serves nothing else.
$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("Ensembler needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(TFLITE)/.installed: setup.cfg pyproject.toml constraints/tflite.txt
	test -x $(TFLITE)/bin/python || $(PYTHON) -m venv $(TFLITE)
	$(TFLITE)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/tflite.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(TFLITE)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/tflite.txt \
		--editable '.[tflite,image,encrypt,package]' pytest pytest-timeout pytest-xdist
	touch $@

$(LEGACY)/.installed: setup.cfg pyproject.toml constraints/legacy.txt
	test -x $(LEGACY)/bin/python || $(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/legacy.txt \
		--editable '.[tflite-runtime,image]' pytest pytest-timeout
	touch $@

$(FUZZ)/.installed: setup.cfg pyproject.toml constraints/fuzz.txt
	test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/fuzz.txt \
		--editable '.[encrypt]' atheris coverage
	touch $@

$(PEERS)/.installed: setup.cfg pyproject.toml constraints/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/peers.txt \
		--editable '.[cloud,encrypt]' grpcio httptools litserve mosec uvloop
	touch $@

$(RAY)/.installed: setup.cfg pyproject.toml constraints/ray.txt
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/ray.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(RAY)/bin/pip --disable-pip-version-check install --quiet --constraint constraints/ray.txt \
		--editable '.[ray,export,encrypt,image]' pytest pytest-timeout
	touch $@

$(CRYPTO)/.installed: setup.cfg pyproject.toml constraints/crypto.txt $(CONSTRAINTS)
	test -x $(CRYPTO)/bin/python || $(PYTHON) -m venv $(CRYPTO)
	$(CRYPTO)/bin/pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(CRYPTO)/bin/pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS) \
		--constraint constraints/crypto.txt --editable '.[crypto,cloud,encrypt,export,image]' hypothesis psutil pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(TFLITE) $(LEGACY) $(FUZZ) $(PEERS) $(RAY) $(CRYPTO) build out *.egg-info
