#!/bin/sh
# Ablation of the modern recipe at the small CPU size: each row adds one setting to the rows before
# it. 3 seeds, once with 200 iterations each, and once with as many as take the same time as the last
# row's 200. On 2 cores of a 2.8 GHz Xeon, 20 minutes or more.
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
ROWS

sweep() {  # name of the sweep; command that prints the number of iterations of a row
    settings=
    while read -r row added; do
        settings="$settings $added"
        iters=$($2 "$row")
        for seed in 1 2 3; do
            python train.py config/train_shakespeare_char_cpu.py --eval_interval=0 --eval_iters=0 \
                $settings --max_iters="$iters" --lr_decay_iters="$iters" --seed=$seed \
                --out_dir="out-ablation/$1/$row/$seed" > /dev/null < /dev/null
        done
    done < out-ablation/rows
}

same_iterations() { echo 200; }

same_time() { python - "$1" <<'PYTHON'
import glob, json, statistics, sys

def ms(row):
    return statistics.median(
        sum(value for key, value in record.items() if key.endswith("_ms"))
        for path in glob.glob(f"out-ablation/iterations/{row}/*/metrics.jsonl")
        for record in map(json.loads, open(path)) if "forward_ms" in record)

last = open("out-ablation/rows").read().splitlines()[-1].split()[0]
print(round(200 * ms(last) / ms(sys.argv[1])))
PYTHON
}

sweep iterations same_iterations
sweep seconds same_time

python - <<'PYTHON'
import glob, json, statistics

for line in open("out-ablation/rows"):
    row = line.split()[0]
    text = f"| {row} |"
    for sweep in ("iterations", "seconds"):
        runs = [[json.loads(line) for line in open(path)]
                for path in sorted(glob.glob(f"out-ablation/{sweep}/{row}/*/metrics.jsonl"))]
        losses = [run[-1]["val_loss"] for run in runs]
        ms = statistics.median(sum(value for key, value in record.items() if key.endswith("_ms"))
                               for run in runs for record in run if "forward_ms" in record)
        text += (f" {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} |"
                 f" {ms:.0f} | {runs[0][-1]['iter']} |")
    print(text)
PYTHON
