# An image with the command `gradsift`. It keeps its work in /work, so mount a folder there:
#
#   docker build -t gradsift .
#   docker run --rm -v "$PWD:/work" gradsift experiment=smoke
#   docker run --rm --gpus all -v "$PWD:/work" gradsift data=json data.path=mine.jsonl proxy=gpt2 stop_after=selection
#
# Build arguments:
#   TORCH_INDEX  address of PyTorch's wheels for one kind of device, from its installation page: the CPU wheels make a
#                small image, those of a CUDA version match an older driver. Empty: the default wheels, which bring CUDA.
#   EXTRAS       optional extras of gradsift, separated by commas.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG TORCH_INDEX=
ARG EXTRAS=launchers,search,human

# the compiled CPU kernels need a C++ compiler at run time
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY src src
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch; fi \
    && pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

RUN useradd --create-home gradsift
USER gradsift
WORKDIR /work
ENV GRADSIFT_ARTIFACTS=/work/artifacts
ENTRYPOINT ["gradsift"]
CMD ["--help"]
