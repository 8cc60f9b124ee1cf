# nemo_r3 for NVIDIA GPUs: what docs/install-gpu.md does by hand, on Ubuntu 24.04 with its Python 3.12.
#   docker build --tag nemo_r3 .
# At run time nothing is downloaded or compiled with nvcc: the engine turns off the kernels that would be (docs/architecture.md).

FROM docker.io/nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# everything is a wheel but Transformer Engine's torch extension, which is compiled against the torch installed before it
COPY requirements/gpu.lock /tmp/
RUN grep --invert-match ^transformer-engine-torch /tmp/gpu.lock > /tmp/wheels.lock \
    && pip install --no-deps --only-binary :all: --requirement /tmp/wheels.lock
ENV NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0
RUN pip install --no-deps --no-build-isolation --requirement /tmp/gpu.lock
WORKDIR /nemo_r3
COPY . .
RUN pip install --no-deps --no-build-isolation --editable .

# Triton compiles its launchers with gcc at run time
FROM docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home r3
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=r3 /nemo_r3 /nemo_r3
# a model's name is not looked up on the hub, unless it is run with --env HF_HUB_OFFLINE=0
ENV PATH=/opt/venv/bin:$PATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
WORKDIR /nemo_r3
USER r3
CMD ["bash"]
