# Serving and training in a container.
#
#   docker build -t instructsam .                            NVIDIA GPU
#   docker build -t instructsam:cpu --build-arg DEVICE=cpu .   CPU; with PIP_OPTIONS="--index-url ..." for PyTorch's CPU build
#   docker run --gpus all -p 127.0.0.1:8000:8000 instructsam
#   docker run --gpus all -p 8000:8000 -e INSTRUCTSAM_TOKEN instructsam
#   docker run --gpus all -p 127.0.0.1:7860:7860 instructsam demo --host 0.0.0.0
#   mkdir -p data outputs weights
#   docker run --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD/data:/app/data" \
#     -v "$PWD/outputs:/app/outputs" -v "$PWD/weights:/app/weights" instructsam train experiment=stage1
#
# 127.0.0.1: for this computer alone. Other computers reach what is published without it: then export INSTRUCTSAM_TOKEN,
# which requests to the service must bring (the web page knows no token). --user: what is written belongs to whoever
# started the container; the image's own user may not write into folders of the host.
ARG DEVICE=gpu

# The developer's image of CUDA: DeepSpeed compiles its kernels with its nvcc.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV EXTRAS=demo,serve,lora,tracking,plots,deepspeed,bnb

FROM python:3.12-slim AS cpu
ENV EXTRAS=demo,serve,lora,tracking,plots

# hadolint ignore=DL3006
FROM ${DEVICE}
ARG PIP_OPTIONS=""
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/app/weights/hub \
    GRADIO_ANALYTICS_ENABLED=False
COPY constraints.txt ./
# PyTorch first and by itself: the largest layer, which a change of the code leaves alone.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && read -ra options <<< "${PIP_OPTIONS}" \
    && pip install "${options[@]}" "$(grep '^torch==' constraints.txt)"
COPY . .
# Whoever `--user` names may write into the last three folders.
RUN pip install -c constraints.txt ".[${EXTRAS}]" \
    && useradd --create-home --uid 10001 instructsam \
    && install --directory --mode=1777 data outputs weights
USER 10001
EXPOSE 8000 7860
ENTRYPOINT ["instructsam"]
CMD ["serve", "--host", "0.0.0.0"]
