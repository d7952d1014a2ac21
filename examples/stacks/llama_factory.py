"""LLaMA-Factory: its Python entry takes callbacks. python llama_factory.py CONFIG.yaml BASE"""

import sys

import yaml
from llamafactory.train.tuner import run_exp

from safelora import SafeLoraCallback

with open(sys.argv[1], encoding="utf-8") as file:
    config = yaml.safe_load(file)
run_exp(config, callbacks=[SafeLoraCallback(base=sys.argv[2], threshold=0.35)])
