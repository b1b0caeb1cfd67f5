#!/bin/sh
# Ablation of the modern recipe at the small CPU size: each row adds one setting to the rows before
# it. 200 iterations, 5 seeds each. On 2 cores, 20 minutes or more.
#
#   python data/shakespeare_char/prepare.py
#   sh docs/ablation.sh
#
# Runs go to out-ablation/, which must not exist; the table is printed from their metrics.jsonl.
set -eu
cd "$(dirname "$0")/.."
mkdir out-ablation

cat > out-ablation/rows <<'ROWS'
classic --warmup_iters=20
linear --schedule=linear --cooldown_frac=0.7 --min_lr=0
muon --optimizer=muon --muon_momentum=0.85 --learning_rate=8e-3
rotary --positions=rotary
qk_norm --qk_norm=True
relu2 --activation=relu2
untied --tie_weights=False
smear --smear=True
bigram --bigram=True
ROWS

settings=
while read -r row added; do
    settings="$settings $added"
    for seed in 1 2 3 4 5; do
        python train.py config/train_shakespeare_char_cpu.py --eval_interval=0 --eval_iters=0 \
            $settings --max_iters=200 --lr_decay_iters=200 --seed=$seed \
            --out_dir="out-ablation/$row/$seed" > /dev/null < /dev/null
    done
done < out-ablation/rows

python - <<'PYTHON'
import glob, json, statistics

before = None
for line in open("out-ablation/rows"):
    row = line.split()[0]
    runs = [[json.loads(line) for line in open(path)]
            for path in sorted(glob.glob(f"out-ablation/{row}/*/metrics.jsonl"))]
    losses = [run[-1]["val_loss"] for run in runs]
    ms = statistics.median(sum(value for key, value in record.items() if key.endswith("_ms"))
                           for run in runs for record in run if "forward_ms" in record)
    text = f"| {row} | {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} | {ms:.0f} |"
    if before:  # Student's t of the differences from the row before, seed by seed
        differences = [a - b for a, b in zip(before, losses, strict=True)]
        t = statistics.mean(differences) / statistics.stdev(differences) * len(losses)**0.5
        text += f" {t:.1f} |"
    print(text)
    before = losses
PYTHON
