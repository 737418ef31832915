"""What importing the callbacks loads beyond Lightning: modules are counted, seconds are not."""

import subprocess
import sys


def loaded(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    return set(found.stdout.split())


def test_the_callbacks_add_little_to_lightning():
    before = loaded("import lightning.pytorch")
    added = loaded("import lightning_sym.callbacks") - before
    foreign = {name.partition(".")[0] for name in added} - {"lightning_sym"} - set(sys.stdlib_module_names)
    assert not foreign & {"timm", "torchvision", "matplotlib", "sklearn", "curvlinops", "kornia", "scipy"}
    assert len(added) < 200
