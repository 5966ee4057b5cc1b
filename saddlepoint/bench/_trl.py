"""trl's SFTTrainer with peft as a peer: one step for each line on standard input, one JSON line about it on standard output.

Run by `saddlepoint bench finetune` in a process of its own; imports nothing of ours. What is given is the data, the base, the LoRA, the
dtype, the batch, the epochs, the peak of the learning rate and its shape; everything else is as the library sets it.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

say = sys.stdout
sys.stdout = sys.stderr  # what the library prints must not mix with our lines


def tell(**values: Any) -> None:
    say.write(json.dumps(values) + "\n")
    say.flush()


class Told(SFTTrainer):  # type: ignore[misc]
    """The library's trainer, which also notes what a step read and its loss."""

    read = padded = 0
    loss = 0.0

    def training_step(self, model: Any, inputs: Any, *more: Any, **other: Any) -> Any:
        Told.read, Told.padded = int(inputs["attention_mask"].sum()), inputs["input_ids"].numel()
        found = super().training_step(model, inputs, *more, **other)
        Told.loss = float(found.detach())
        return found


class Turns(TrainerCallback):  # type: ignore[misc]
    """Waits before each step and reports after it."""

    began = cpu = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline().strip():
            raise SystemExit
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        spent = {"seconds": time.perf_counter() - self.began, "cpu": time.process_time() - self.cpu}
        tell(**spent, tokens=Told.read, padded=Told.padded, loss=Told.loss)


def main(given: dict[str, Any]) -> None:
    torch.set_num_threads(given["threads"])
    more = {} if given["checkpointing"] else {"gradient_checkpointing": False}
    config = SFTConfig(
        output_dir=given["out"],
        per_device_train_batch_size=given["batch"],
        num_train_epochs=given["epochs"],
        learning_rate=given["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, given["steps"] // 20),
        seed=given["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=given["device"] == "cpu",
        bf16=given["dtype"] == "bfloat16",
        **more,
    )
    trainer = Told(
        model=AutoModelForCausalLM.from_pretrained(given["folder"], dtype=getattr(torch, given["dtype"])),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in given["chats"]]),
        processing_class=AutoTokenizer.from_pretrained(given["folder"]),
        peft_config=LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Turns()],
    )
    tell(ready=True)
    trainer.train()
    trainer.save_model(given["out"])
    tell(done=given["out"])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(json.loads(sys.argv[1]))
