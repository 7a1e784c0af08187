"""Print the pictures of `docs/methods.md`: the program of every method.

python docs/make_methods.py
"""

from stalewise.methods import METHOD_NAMES, build_method

for name in METHOD_NAMES:
    options = {"micro_batches": 3} if name in ("gpipe", "1f1b") else {}
    batches = 2 if name in ("gpipe", "1f1b") else 4
    program = build_method(name, num_stages=3, **options).program()
    print(f"## {name}\n")
    print(program.grid(min(batches + program.drain_steps, 8), num_batches=batches), end="\n\n")
