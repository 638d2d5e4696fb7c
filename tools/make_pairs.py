"""Samples answers with vLLM, judges them by a recipe's rewards, and writes what preference training reads.

    python tools/make_pairs.py CONFIG OUT [key=value ...]

    OUT/pairs.jsonl     {"prompt", "chosen", "rejected"}: the answer of highest reward with each that has a lower one
    OUT/judged.jsonl    {"prompt", "response", "label"}: of each prompt the best answer and a worse one, true and false
    OUT/steps.jsonl     {"prompt", "response", "label"}: answers by their characters and their end, each right while the
                        answer up to it begins as the best one does; for problems with one right answer
    OUT/heldout_*.jsonl the same of other prompts

CONFIG is a recipe of kind rl: its model answers its prompts, and its rewards judge. A prompt whose answers all have the
same reward makes no pair.
"""

import argparse
import json
from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.datasets import load_prompts
from megatron_rl.data.samples import Sample
from megatron_rl.rewards.scoring import resolve_rewards, score
from megatron_rl.sync.engines import build_engine
from megatron_rl.trainer.rollouts import draw_seeds, training_sampling


def sample_groups(config: Config, num_prompts: int) -> list[list[Sample]]:
    """The scored answers of the first prompts."""
    limit, sampling = config.data.max_prompt_tokens, config.rollout.sampling
    tokenizer = load_tokenizer(config.model.hf_path)
    prompts = load_prompts(str(config.data.train), config.data, tokenizer, max_prompt_tokens=limit)[:num_prompts]
    engine = build_engine(
        config.rollout,
        model_path=config.model.hf_path,
        dtype=config.model.params_dtype.value,
        max_model_len=limit + sampling.max_response_tokens,
        seed=config.seed,
        batch_invariant=False,
    )
    rewards = resolve_rewards(config.rewards)
    completions = engine.generate(
        prompts,
        num_samples=config.rollout.num_samples_per_prompt,
        sampling=training_sampling(sampling),
        seeds=draw_seeds(config.seed, 0, len(prompts)),
    )
    engine.shutdown()
    return [score([p] * len(of_p), of_p, rewards) for p, of_p in zip(prompts, completions, strict=True)]


def write(folder: Path, prefix: str, groups: list[list[Sample]], prompt_key: str, end: str) -> int:
    """Write pairs, single answers and steps of some prompts; return the number of pairs. `end`: of an answer."""
    pairs, judged, steps = [], [], []
    for group in groups:
        ended = [sample for sample in group if sample.completion.finish_reason == "stop" and sample.completion.text]
        if not ended:
            continue
        best = max(ended, key=lambda sample: sample.reward)
        worse = {sample.completion.text: sample for sample in ended if sample.reward < best.reward}
        prompt = best.prompt.row[prompt_key]
        for text in worse:
            pairs.append({"prompt": prompt, "chosen": best.completion.text, "rejected": text})
        for text, label in ((best.completion.text, True), *((text, False) for text in list(worse)[:1])):
            if worse:
                judged.append({"prompt": prompt, "response": text, "label": label})
        for text in (best.completion.text, *worse) if worse else ():
            right = [best.completion.text.startswith(text[:i]) for i in range(1, len(text) + 1)]
            right.append(text == best.completion.text)
            steps.append({"prompt": prompt, "response": [*text, end], "label": right})
    for name, rows in (("pairs", pairs), ("judged", judged), ("steps", steps)):
        (folder / f"{prefix}{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(pairs)


def main() -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num-prompts", type=int, default=5000)
    parser.add_argument("--heldout-fraction", type=float, default=0.1)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    groups = sample_groups(config, arguments.num_prompts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    num_heldout = int(len(groups) * arguments.heldout_fraction)
    end = load_tokenizer(config.model.hf_path).eos_token
    heldout = write(arguments.out, "heldout_", groups[:num_heldout], config.data.prompt_key, end)
    train = write(arguments.out, "", groups[num_heldout:], config.data.prompt_key, end)
    print(f"{arguments.out}: {train} pairs and {heldout} held-out pairs of {len(groups)} prompts")


if __name__ == "__main__":
    main()
