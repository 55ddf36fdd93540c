# For machines with an NVIDIA GPU; torch's wheels bring their own CUDA libraries. Written and linted, not built by those
# who wrote it.
#   docker build -t norton .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" norton train_det --config configs/train/coco_mask.yaml ...
FROM python:3.11-slim-bookworm

# OpenCV's windows and fonts are the only system libraries; torch.compile would also want a compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/norton
COPY pyproject.toml README.md LICENSE ./
COPY .ci/constraints.txt .ci/constraints.txt
COPY norton_deploy norton_deploy
COPY configs configs
RUN pip install --no-cache-dir --constraint .ci/constraints.txt '.[export,tensorrt]'

ENV OMP_WAIT_POLICY=passive
ENTRYPOINT ["norton"]
CMD ["--help"]
