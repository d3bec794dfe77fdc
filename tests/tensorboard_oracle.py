"""Reads the event files that src/report/metrics_test.cc wrote with the tensorboard package.

usage: tensorboard_oracle.py FOLDER     exit code 0: as written; 1: not; 77: no tensorboard package
"""
import sys

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def main(folder):
    events = EventAccumulator(folder)
    events.Reload()
    tags = events.Tags()
    assert sorted(tags["scalars"]) == ["train/loss", "train/share"], tags
    assert tags["tensors"] == ["sample/text_summary"], tags
    assert events.file_version == 2.0, events.file_version

    loss = [(e.step, e.value) for e in events.Scalars("train/loss")]
    expected = [(step, 10 / step) for step in range(1, 11)] + [(2**40, -1.0)]
    assert [s for s, _ in loss] == [s for s, _ in expected], loss
    assert all(abs(a - b) <= 1e-6 * abs(b) for (_, a), (_, b) in zip(loss, expected)), loss
    share = events.Scalars("train/share")[0]
    assert abs(share.value - 0.15) < 1e-7 and share.wall_time > 1.6e9, share

    text = events.Tensors("sample/text_summary")[0]
    values = tensor_util.make_ndarray(text.tensor_proto)
    assert text.step == 12 and values.shape == (1,), (text.step, values)
    assert values[0].decode("utf-8") == "# größer\n\nsecond *paragraph*", values
    metadata = events.SummaryMetadata("sample/text_summary")
    assert metadata.plugin_data.plugin_name == "text", metadata
    print(f"tensorboard read back {len(loss)} + 1 scalars and a text")


if __name__ == "__main__":
    main(sys.argv[1])
