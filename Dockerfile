# An image that trains and evaluates on NVIDIA GPUs; the host has the driver and its container toolkit, nothing else.
#
#   docker build -t moejax .
#   docker build -t moejax:cpu --build-arg ACCELERATOR=cpu .     (or tpu)
#   docker run --rm --gpus=all --volume="$PWD/runs:/moejax/runs" moejax \
#     python -m moejax.train --config=configs/vmoe_digits.py --workdir=runs/vmoe_digits
FROM python:3.12-slim

# The first process of a container gets signals that nobody else passes on, and has to wait for its orphans: tini does.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes tini \
 && rm -rf /var/lib/apt/lists/*

# By itself, for it is nearly all of the image, and does not change with the code.
ARG ACCELERATOR=cuda13
RUN pip install --no-cache-dir "jax[${ACCELERATOR}]>=0.10.2,<0.13"

WORKDIR /moejax
COPY . .
RUN pip install --no-cache-dir --editable '.[data,gcs]' \
 && useradd --uid=1000 --create-home moejax \
 && install --directory --mode=1777 runs

# Any user will do, such as the one who owns the mounted folder (docker run --user="$(id -u):$(id -g)").
ENV MPLCONFIGDIR=/tmp/matplotlib
USER 1000
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "moejax.train", "--help"]
