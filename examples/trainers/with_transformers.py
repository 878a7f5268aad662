"""AdaHessian in Hugging Face's Trainer: a small vision transformer, from scratch."""

from __future__ import annotations

import tempfile

from digits import images_and_labels
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from adahessian_fused import AdaHessian, curvature_friendly


def rows(dataset) -> list[dict]:
    """Return the data set under the names of the model's arguments."""
    return [{"pixel_values": image, "labels": label} for image, label in dataset]


def main() -> tuple[AdaHessian, float]:
    """Train for four epochs; the optimizer and the test accuracy."""
    set_seed(0)
    train, test = images_and_labels()
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, initializer_range=0.1, **size)
    model = ViTForImageClassification(config)
    opt = AdaHessian(model.parameters(), lr=0.05, hessian_power=0.5, update_each=2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=4,
            per_device_train_batch_size=64,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows(train),
            eval_dataset=rows(test),
            optimizers=(opt, None),
            compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        )
        with opt.hook_backward(), curvature_friendly(model, opt):
            trainer.train()
        return opt, trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    print(f"test accuracy {main()[1]:.3f}")
