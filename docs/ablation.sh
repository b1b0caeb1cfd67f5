#!/bin/sh
# Ablation of the modern recipe: config/fast_shakespeare_char_cpu.py, and the same with one setting
# changed. On 2 cores, 20 minutes or more.
#
#   python data/shakespeare_char/prepare.py
#   sh docs/ablation.sh
#   SEEDS="1 2 3 4 5 6 7 8 9 10" sh docs/ablation.sh --activation=gelu_tanh  # other seeds, other rows
#
# SEEDS are two or more. Runs go to out-ablation/, which must not exist; the table is printed from
# their metrics.jsonl.
set -eu
cd "$(dirname "$0")/.."
mkdir out-ablation

[ $# -gt 0 ] || set -- "--optimizer=adamw --learning_rate=4e-3" --positions=learned --bigram=False \
    --qk_norm=False --schedule=cosine --activation=gelu_tanh --smear=True --tie_weights=False
for row in recipe "$@"; do
    for seed in ${SEEDS:-1 2 3 4 5}; do
        python train.py config/fast_shakespeare_char_cpu.py --sample_every=0 --seed=$seed \
            ${row#recipe} --out_dir="out-ablation/$row/$seed" > /dev/null < /dev/null
    done
done

python - recipe "$@" <<'PYTHON'
import glob, json, statistics, sys

recipe = None
for row in sys.argv[1:]:
    losses = [json.loads(open(path).readlines()[-1])["val_loss"]
              for path in sorted(glob.glob(f"out-ablation/{row}/*/metrics.jsonl"))]
    text = f"| `{row}` | {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} |"
    if recipe:  # Student's t of the differences, seed by seed
        differences = [a - b for a, b in zip(losses, recipe, strict=True)]
        t = statistics.mean(differences) / statistics.stdev(differences) * len(losses)**0.5
        text += f" {statistics.mean(differences):+.3f} | {t:.1f} |"
    recipe = recipe or losses
    print(text)
PYTHON
