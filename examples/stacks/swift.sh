#!/usr/bin/env bash
# ms-swift: the callback projects the adapter at the end of training. swift.sh MODEL BASE DATA OUT
set -euo pipefail
plugin=$(python -c 'import importlib.util as u; print(u.find_spec("safelora.contrib.swift").origin)')
SAFELORA_BASE="$2" SAFELORA_THRESHOLD=0.35 swift sft --model "$1" --dataset "$3" --output_dir "$4" \
  --tuner_type lora --external_plugins "$plugin" --callbacks safelora
