"""The model of evaluation/lmms.py for chat tasks of lmms-eval: dialogues with images among their texts.

    python -m lmms_eval --model llava_from_scratch_chat --model_args pretrained=DIR --tasks mmmu_val --batch_size 16

Such a task can only generate, in one round. A task without messages of its own gives its images and its question.
"""

from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from data import PreparedImage
from evaluation.lmms import LlavaFromScratch
from inputs.records import Turn


class LlavaFromScratchChat(LlavaFromScratch):
    is_simple, options_at = False, 2

    def read(self, args: tuple) -> tuple[list[Turn], list[PreparedImage]]:
        _, doc_to_messages, _, doc_id, task, split = args
        turns, images = turns_of_messages(ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])))
        return turns, self.prepare(images)

    def generate_until_multi_round(self, requests: list):
        raise NotImplementedError("several rounds: --model llava_from_scratch")


def turns_of_messages(dialogue: ChatMessages) -> tuple[list[Turn], list]:
    """The turns of a dialogue, of which the last has no answer, and what its images are. A single image stands before
    the text of its message, as in our chat templates; several stay where they are. Raises ValueError."""
    turns, images, system = [], [], ""
    for message in dialogue.messages:
        texts, waits = [""], bool(turns) and turns[-1].answer is None
        for part in message.content:
            if part.type == "text":
                texts[-1] += part.text
            else:
                images.append(part.url)
                texts.append("")
        text, count = "".join(texts), len(texts) - 1
        if message.role == "system" and not turns and not count:
            system = text
        elif message.role == "user" and not waits:
            turns.append(Turn(text, None, count, parts=tuple(texts) if count > 1 and any(texts[:-1]) else ()))
        elif message.role == "assistant" and waits and not count:
            turns[-1].answer = text
        else:
            raise ValueError(f"a message is from {message.role}: user and assistant take turns, user first")
    if not turns or turns[-1].answer is not None:
        raise ValueError("the last message must be the user's")
    turns[0].system = system
    return turns, images


MANIFEST = ModelManifest("llava_from_scratch_chat", chat_class_path=f"{__name__}.LlavaFromScratchChat")
