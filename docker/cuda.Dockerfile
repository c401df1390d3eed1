# docker build -f docker/cuda.Dockerfile -t fastunet:cuda .
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" -v fastunet-cache:/cache fastunet:cuda train DATA --out RUN
# The host needs NVIDIA's driver and container toolkit; torch's wheels bring CUDA, cuDNN and Triton.
FROM python:3.11-slim
# Triton compiles its launchers with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /fastunet
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[train]'
# What is measured on the GPU is kept in a volume.
ENV FASTUNET_CACHE=/cache
WORKDIR /data
ENTRYPOINT ["fastunet"]
CMD ["--help"]
