# Training on NVIDIA GPUs: docs/cloud.md says how to build and run it.
#
# A plain Python image, not one of NVIDIA's: the wheels of jax[cuda13] bring CUDA, cuDNN, NCCL and NVRTC in the
# versions that this jaxlib was built with, and another copy in the image could only be the wrong one. What they
# do not bring, the driver (release 580 or later), belongs to the host; the NVIDIA Container Toolkit shows it.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /adderflax
COPY requirements.txt .
RUN sed 's/^jax==/jax[cuda13]==/' requirements.txt > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt
COPY . .

# The exec form: SIGTERM of `docker stop` reaches Python, which saves and exits with code 75.
ENTRYPOINT ["python", "train.py"]
