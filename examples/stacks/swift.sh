#!/usr/bin/env bash
# ms-swift: the projected adapter is saved to OUT/<run>/safelora; checkpoints stay as trained. swift.sh MODEL BASE DATA OUT
set -euo pipefail
plugin=$(python -c 'import importlib.util as u; print(u.find_spec("safelora").submodule_search_locations[0])')
SAFELORA_BASE="$2" SAFELORA_THRESHOLD=0.35 swift sft --model "$1" --dataset "$3" --output_dir "$4" \
  --tuner_type lora --external_plugins "$plugin/contrib/swift/safelora_swift.py" --callbacks safelora
