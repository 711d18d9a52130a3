"""Laws of the store: it gives back what it was given, in memory or from files that nobody else sees."""

import os
import tempfile

import pytest
import torch

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.store import Store


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return Store(tmp_path if request.param == "disk" else None)


class TestStore:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
    def test_keeps_numbers_shapes_and_dtypes(self, store, dtype, generator):
        given = (10 * torch.randn(3, 7, generator=generator)).to(dtype)
        tensors = {"a": given, "none": given[:0], "transposed": given.T, "one": given[0, 0]}
        kept = store.keep_all(tensors)
        assert list(kept) == list(tensors)
        for name, tensor in tensors.items():
            assert kept[name].dtype == dtype and torch.equal(kept[name], tensor)
        assert torch.equal(store.keep(given), given)

    def test_keeps_no_graph(self, store):
        assert not store.keep(torch.ones(2, requires_grad=True) * 2).requires_grad

    def test_nothing_to_keep(self, store):
        assert store.keep_all({}) == {}
        assert store.keep(torch.empty(1, 0, 4)).shape == (1, 0, 4)

    def test_files_have_no_name_and_their_numbers_are_mapped(self, tmp_path):
        kept = Store(tmp_path).keep(torch.arange(5000.0))
        assert not list(tmp_path.iterdir())
        with open("/proc/self/maps") as maps:
            assert any(str(tmp_path) in line and "(deleted)" in line for line in maps)
        assert kept[-1] == 4999
        del kept
        with open("/proc/self/maps") as maps:
            assert not any(str(tmp_path) in line for line in maps)

    def test_what_is_written_to_a_kept_tensor_stays_in_memory(self, store):
        kept = store.keep(torch.zeros(4))
        kept += 1
        assert torch.equal(kept, torch.ones(4))

    def test_full_disk_is_an_error(self, tmp_path, monkeypatch):
        class Full:
            name = str(tmp_path / "full")

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def write(self, content):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **options: Full())
        with pytest.raises(OSError, match="No space left"):
            Store(tmp_path).keep(torch.zeros(4))

    def test_open_follows_the_configuration(self, tmp_path, monkeypatch):
        for offload in (None, "cpu"):
            with Store.open(D2QuantConfig(offload=offload)) as store:
                assert store.folder is None
        work_dir = tmp_path / "work"
        with Store.open(D2QuantConfig(offload="disk", work_dir=str(work_dir))) as store:
            assert store.folder is not None and store.folder.parent == work_dir
        assert not os.listdir(work_dir)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with Store.open(D2QuantConfig(offload="disk")) as store:
            assert store.folder is not None and store.folder.parent == tmp_path
