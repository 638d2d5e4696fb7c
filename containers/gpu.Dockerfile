# The GPU environment as a container: docker build -f containers/gpu.Dockerfile -t megatron-rl .
# Not built yet; its first two steps' packages have been installed elsewhere, see docs/gpu.md.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv git build-essential \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
# GPUs to build Transformer Engine for: 90 is Hopper, 100 Blackwell.
ARG CUDA_ARCHS=90
ENV NVTE_CUDA_ARCHS=${CUDA_ARCHS} NVTE_FRAMEWORK=pytorch MAX_JOBS=8
WORKDIR /opt/megatron_rl
# The slow layers depend on the versions alone, so that a change of the code rebuilds the last one only.
COPY requirements/gpu.txt requirements/gpu-build.txt requirements/
RUN python3.12 -m venv /opt/venv && pip install --no-cache-dir -r requirements/gpu.txt
RUN pip install --no-cache-dir --no-build-isolation -r requirements/gpu-build.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . && megatron-rl doctor
