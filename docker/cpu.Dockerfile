# docker build -f docker/cpu.Dockerfile -t fastunet .
# docker run --rm -v "$PWD:/data" fastunet train DATA --out RUN
FROM python:3.11-slim
WORKDIR /fastunet
COPY . .
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c constraints.txt '.[train]'
WORKDIR /data
ENTRYPOINT ["fastunet"]
CMD ["--help"]
