"""The benchmark of networks with several streams: its data, and that every pair is measured."""

import torch

from benchmarks import streams
from benchmarks.streams import Task, accuracy, cross_entropy, logits, measured

WORDS = torch.randint(3, 20, (60, 8), generator=torch.Generator().manual_seed(0))


def draw_sentences(count, generator):
    chosen = torch.randint(0, len(WORDS), (count,), generator=generator)
    ids, mask = WORDS[chosen].clone(), torch.ones(count, 8, dtype=torch.long)
    ids[:, 6:], mask[:, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": chosen % 2}


def draw_images(count, generator):
    return streams.noisy(torch.randn(20, 3, 32, 32, generator=generator), count, generator)


def task(build, outputs, draw, loss, score):
    test = [draw(30, torch.Generator().manual_seed(1))]
    return Task(build, ["deep", "shallow"], outputs, draw, test, loss, score, steps=3, rate=1e-3)


TASKS = {
    "BERT": task(
        [lambda: streams.bert(2, 17, 16), lambda: streams.bert(1, 17, 16)],
        logits,
        draw_sentences,
        cross_entropy,
        accuracy,
    ),
    "U-Net": task(
        [lambda: streams.UNet(2, (4, 6)), lambda: streams.UNet(1, (4, 6))],
        streams.restored,
        draw_images,
        torch.nn.functional.mse_loss,
        lambda outputs, labels: float((outputs - labels).square().mean()),
    ),
}


def test_every_pair_is_measured_and_all_weight_gives_a_parent():
    for kind, of in TASKS.items():
        pair = [streams.trained(of, one, of.steps, i) for i, one in enumerate(of.build)]
        inputs = streams.in_batches(of.draw(40, torch.Generator().manual_seed(2)), 20)
        found = measured(of, pair, inputs)
        assert list(found)[:3] == ["deep", "shallow", "both side by side"], kind
        assert len(found) == 10, kind
        assert all(found[f"weight 1: {name}"] < 6e-5 for name in of.names), kind
        parts = [streams.outputs_of(of, one) for one in pair]
        assert found["both side by side"] == of.score(sum(parts) / 2, of.test[0]["labels"]), kind


def test_sentences_are_numbered_with_padding_and_a_start():
    batch = streams.numbered([(["a", "fine", "film"], 1), (["film"], 0)], {"film": 7, "a": 3})
    assert batch["input_ids"][:, :5].tolist() == [[2, 3, 1, 7, 0], [2, 7, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert batch["labels"].tolist() == [1, 0]


def test_a_decoder_reads_what_stands_before_the_character_that_it_writes():
    batch = streams.hidden(WORDS.flatten(), 50, torch.Generator().manual_seed(3))
    labels = batch["labels"]
    assert torch.equal(batch["decoder_input_ids"][:, 1:], labels[:, :-1])
    assert not bool(batch["decoder_input_ids"][:, 0].any())
    is_hidden = batch["input_ids"] == 1
    assert torch.equal(batch["input_ids"][~is_hidden], labels[~is_hidden])
    assert abs(float(is_hidden.double().mean()) - streams.HIDDEN) < 0.05
