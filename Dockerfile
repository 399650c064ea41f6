# The environment of `make test`: docker build -t decoder-lab . && docker run --rm decoder-lab
FROM python:3.11-slim
# `git` lists the files that the tests look at; the compiler is for requirements without a wheel.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /decoder-lab
COPY . .
RUN make install PIP_FLAGS="-c constraints/py311.txt"
CMD ["make", "test"]
