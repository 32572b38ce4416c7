# One machine with an NVIDIA GPU: docs/how-to/run_on_a_gpu.md
#
# torch's wheels contain the CUDA libraries; the host needs its driver and NVIDIA's container toolkit.
FROM python:3.12-slim

# g++ is for torch.compile
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /tritter
COPY . .
RUN make setup
ENV PATH=/tritter/.venv/bin:$PATH

CMD ["python", "train.py", "trainer=gpu"]
