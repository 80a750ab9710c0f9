#!/usr/bin/env python
"""A plan for 70B on 1,024 GPUs over all legal layouts, in bf16 and in FP8: seconds from the settings to the ranking.

Each turn runs tools/plan.py in a process of its own, as a user starts it, and the ranking alone in this one. No other tool answers the
same question, so that there is no peer; the bound is ten seconds. Processor time says what the ranking takes on a machine that does
other things, too. The last line is JSON with medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BOUND_SECONDS = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="70B", help="size")
    parser.add_argument("--gpu", default="h100", help="kind of GPU")
    parser.add_argument("--num-gpus", type=int, default=1024)
    parser.add_argument("--global-batch-size", type=int, default=1024, help="sequences")
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured")
    options = parser.parse_args()

    from megatron_instruct.planning.config import ClusterOptions, ModelOptions, PlanConfig, TrainingOptions
    from megatron_instruct.planning.constants import load_constants
    from megatron_instruct.planning.run import make_task
    from megatron_instruct.planning.search import rank

    result: dict[str, object] = {"preset": options.preset, "gpu": options.gpu, "num_gpus": options.num_gpus, "bound_seconds": BOUND_SECONDS}
    for precision in ("bf16", "fp8"):
        training = TrainingOptions(seq_length=options.seq_length, global_batch_size=options.global_batch_size, precision=precision)
        cluster = ClusterOptions(gpu=options.gpu, num_gpus=options.num_gpus)
        task = make_task(PlanConfig(model=ModelOptions(preset=options.preset), cluster=cluster, training=training))
        flags = ["--preset", options.preset, "--gpu", options.gpu, "--num-gpus", str(options.num_gpus), "--precision", precision]
        flags += ["--global-batch-size", str(options.global_batch_size), "--seq-length", str(options.seq_length)]
        ranked, busy, whole, legal = [], [], [], 0
        for turn in range(options.turns):
            start, processor = time.perf_counter(), time.process_time()
            legal = rank(task, load_constants()).legal
            ranked.append(time.perf_counter() - start)
            busy.append(time.process_time() - processor)
            start = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / "tools" / "plan.py"), *flags], check=True, stdout=subprocess.DEVNULL)
            whole.append(time.perf_counter() - start)
            print(f"turn {turn + 1}/{options.turns}, {precision}: ranking {ranked[-1]:.2f} s, whole process {whole[-1]:.2f} s", flush=True)
        result |= {
            f"{precision}_legal_layouts": legal,
            f"{precision}_ranking_seconds": round(statistics.median(ranked), 2),
            f"{precision}_ranking_processor_seconds": round(statistics.median(busy), 2),
            f"{precision}_seconds": round(statistics.median(whole), 2),
            f"{precision}_within_bound": statistics.median(whole) < BOUND_SECONDS,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
