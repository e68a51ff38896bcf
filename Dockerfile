# posttrain as an installed package, in an image whose user is not root:
#   docker build -t posttrain .
#   docker run --rm --gpus all --shm-size=16g -v "$PWD:/work" posttrain sft --num_gpus 8 my_recipe.yaml
# What a run writes belongs into /work, the folder that is mounted; --user "$(id -u):$(id -g)" -e HOME=/work writes it as yours.
# For H100, H200 and B200 add --build-arg EXTRAS=gpu,fa4,wandb. For machines without a GPU:
#   docker build -t posttrain --build-arg BASE=ubuntu:24.04 --build-arg EXTRAS=wandb \
#     --build-arg PIP_INDEX_URL=https://download.pytorch.org/whl/cpu --build-arg PIP_EXTRA_INDEX_URL=https://pypi.org/simple .
# The tests lint this file and compare it with the checkout; they do not build it.

# torch brings CUDA's libraries along; of the base image only its settings for NVIDIA's container toolkit matter. It must have apt-get and
# Python 3.11 or newer
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint ignore=DL3006
FROM ${BASE} AS python
# a compiler and Python's headers: Triton compiles kernels during a run, and DeepSpeed its CPU Adam, for offload
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*

FROM python AS wheel
WORKDIR /source
COPY . .
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python
ARG EXTRAS=gpu,wandb
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG PIP_EXTRA_INDEX_URL=
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3 -m venv /opt/posttrain \
    && wheel=(/wheels/*.whl) \
    && /opt/posttrain/bin/pip install --no-cache-dir --constraint /wheels/constraints.txt "${wheel[0]}[${EXTRAS}]" \
    && rm -r /wheels \
    && useradd --uid 10001 --create-home posttrain \
    && install --directory --owner posttrain /work
ENV PATH=/opt/posttrain/bin:$PATH
USER 10001
WORKDIR /work
ENTRYPOINT ["posttrain"]
CMD ["--help"]
