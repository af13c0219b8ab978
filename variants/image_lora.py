"""LoRA that applies only when there is an image: text alone is answered by the base model, bit for bit.

    python train.py --stage 2 --model BASE --lora llm --lora-images-only --out ADAPTER

A decoder that learns to see with an ordinary LoRA also forgets some of what it knew, because the update changes its
answers to everything. Here the decoder's updates are multiplied by 1 in rows that have an image and by 0 in all others.
So nothing is forgotten, whatever the learning rate, as long as there is no image. config.json keeps the choice, as
`lora_images_only`. Merging ends it: a merged update applies to every row.

Source: Phi-4-multimodal switches LoRAs by modality in the same way (Abouelenin et al. 2025, arXiv 2503.01743).
Shapes: B rows, T tokens, N tokens that are kept, C width.
"""

from torch import Tensor, nn


class ImageRows:
    """Knows which rows of the current pass have an image, and multiplies the updates of the others by 0.

    Llava.embed sees the ids of a prompt; the decoder then reads their embeddings. Tokens that are generated do not pass
    there, so the rows of a prompt are kept with the cache, as cache.image_rows (B,). Embeddings from elsewhere, as the
    noise that checks a merge, count as rows with an image.
    """

    def __init__(self, model: nn.Module):
        self.embed, self.image_id = model.embed, model.config.image_token_index
        self.rows = self.kept = self.of_prompt = None
        model.embed = self.embed_and_see
        decoder = model.language_model.model
        decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        for path, module in decoder.named_modules():
            if path.endswith(".lora_B"):
                module.register_forward_hook(self.gate)

    def embed_and_see(self, input_ids: Tensor, *images, **options) -> Tensor:
        self.of_prompt = (input_ids == self.image_id).any(dim=1)  # (B,)
        return self.embed(input_ids, *images, **options)

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Before the decoder reads: arguments as in Decoder.forward."""
        names = ("padding", "cache", "keep")[len(args) - 1 :]
        _, _, cache, keep = (*args, *(kwargs.get(name) for name in names))[:4]  # a mask may follow
        rows = self.of_prompt
        if rows is None and (cache is None or not cache.used):
            rows = args[0].new_ones(len(args[0]), dtype=bool)
        if cache is not None:
            if cache.used:
                rows = cache.image_rows if rows is None else cache.image_rows | rows
            cache.image_rows = rows
        self.of_prompt = None
        self.rows = rows[:, None, None]  # (B, 1, 1)
        self.kept = None if keep is None else rows[:, None].expand_as(keep)[keep][:, None]  # (N, 1), of the last MLP

    def gate(self, module: nn.Module, inputs: tuple, update: Tensor) -> Tensor:
        """The update (B, T, C), or (N, C) of the tokens that are kept, times 1 or 0."""
        return update * (self.rows if update.ndim == 3 else self.kept)
