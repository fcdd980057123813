# syntax=docker/dockerfile:1
# vlp with CUDA, the locked packages, flash-attn and DeepSpeed's operators, for a user who is not root.
#
#   docker build --target check .      # builds all of it and runs `make test` inside
#   docker build --tag vlp .
#   docker run --gpus all --shm-size=16g -v /scratch/me:/data vlp \
#     python train.py +experiment=quickstart paths.runs=/data/runs paths.data=/data/cache
#
# The CUDA of the base and that of the locked torch must have the same major version: both compile the operators below.

FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      build-essential ca-certificates git libaio-dev make ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /bin/bash vlp && install -d -o vlp -g vlp /opt/vlp /data
USER 10001:10001
WORKDIR /opt/vlp

# The packages first: a change of the code does not install them again.
COPY --chown=vlp:vlp Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY --chown=vlp:vlp vlp/__init__.py vlp/
RUN make setup

# Compiled for A100 (8.0), L40S and RTX 4090 (8.9), H100 and H200 (9.0); fewer architectures build faster.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.9;9.0"
ARG FLASH_ATTN_VERSION=2.8.3
ARG MAX_JOBS=8
ENV CUDA_HOME=/usr/local/cuda
RUN FLASH_ATTN_CUDA_ARCHS="80;90" .venv/bin/uv pip install --python .venv/bin/python --no-cache --no-build-isolation --no-deps \
      "flash-attn==${FLASH_ATTN_VERSION}"
# The same version as in the lock, again from source, so that no job compiles an operator at its first step.
RUN version=$(sed -n 's/^deepspeed==\([^ ]*\).*/\1/p' requirements.lock) \
    && DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 DS_BUILD_UTILS=1 .venv/bin/uv pip install --python .venv/bin/python \
      --no-cache --no-build-isolation --no-deps --no-binary deepspeed --reinstall-package deepspeed "deepspeed==${version}"

COPY --chown=vlp:vlp . .
ENV PATH=/opt/vlp/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VLP_PYTHON=/opt/vlp/.venv/bin/python

# `docker build --target check .` fails where the tests fail.
FROM build AS check
RUN make test

FROM build AS final
CMD ["python", "plan.py", "+experiment=quickstart"]
