# Two images: `serve` contains only what serving needs; `train`, the default, can also train.
#
#   docker build --tag elbo .                                        CPU
#   docker build --tag elbo:cuda --build-arg TORCH=cu130 .           CUDA 13.0; other builds of PyTorch work as well

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/elbo/bin:/opt/source/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# Dependencies come before the source: they change rarely, so their layers stay cached.
FROM base AS packages
RUN python -m venv --without-pip /opt/elbo
COPY requirements/serve.lock requirements/torch-*.lock /
RUN pip --python /opt/elbo/bin/python install --no-cache-dir --require-hashes -r /serve.lock
ARG TORCH=cpu
# The hashes of the CPU wheels of Python 3.11 are in torch-cpu.lock. A CUDA wheel has no lock file: it installs libraries of
# NVIDIA whose versions differ between builds.
RUN if [ -f "/torch-${TORCH}.lock" ]; then set -- --no-deps --require-hashes -r "/torch-${TORCH}.lock"; \
    else echo "torch is installed without a hash: there is no requirements/torch-${TORCH}.lock"; set -- "torch==2.13.0+${TORCH}"; fi \
    && pip --python /opt/elbo/bin/python install --no-cache-dir "$@" --index-url "https://download.pytorch.org/whl/${TORCH}" \
    # Remove headers, tests and tools, a fifth of the wheel, which nothing uses at run time.
    && cd /opt/elbo/lib/python3.11/site-packages/torch && rm -rf include test \
    && find bin -type f ! -name torch_shm_manager -delete

FROM packages AS source
WORKDIR /source
COPY . .
RUN pip --python /opt/elbo/bin/python install --no-cache-dir --no-deps --target /opt/source .

# The server listens on every interface, so it starts only with API keys (ELBO_API_KEYS_FILE) or with ELBO_INSECURE=1.
# The user is numeric, so that an orchestrator can verify that it is not root. It can write to /artifacts and /state only.
# Another user works, too: OpenShift runs images as any user of group 0, and SageMaker as root.
FROM base AS serve-packages
RUN useradd --uid 10001 --no-create-home --home-dir /tmp elbo \
    && install --directory --owner elbo --group root --mode 0775 /artifacts /state
COPY --from=packages /opt/elbo /opt/elbo
ENV HOME=/tmp PYTHONPATH=/opt/source ELBO_HOST=0.0.0.0 ELBO_PORT=8000 ELBO_ARTIFACTS=/artifacts ELBO_RUNS=/artifacts/.runs
VOLUME /artifacts
EXPOSE 8000
# Inference pipelines of SageMaker choose the port with SAGEMAKER_BIND_TO_PORT if the image has this label.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-m", "service.healthcheck"]
ENTRYPOINT ["elbo"]
CMD ["serve"]

FROM serve-packages AS train-packages
RUN --mount=type=bind,source=requirements/train.lock,target=/train.lock \
    pip --python /opt/elbo/bin/python install --no-cache-dir --require-hashes -r /train.lock

FROM serve-packages AS serve
COPY --from=source /opt/source /opt/source
USER 10001:10001

FROM train-packages AS train
COPY --from=source /opt/source /opt/source
USER 10001:10001
