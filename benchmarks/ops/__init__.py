"""Whom an operator is compared with: one module each, with

    PROVIDERS    name -> function that takes the inputs of the operator's spec; "plain" is upstream's formula
    ARGUMENTS    optional: arguments that differ from the spec's
    FUNCTIONS    optional: further public functions of the room, timed against the same providers: name -> (their spec,
                 a function of their result and the inputs that gives what the providers give, to be verified)

Backends of this package come as providers by themselves (`stellar_fast.cpu`, ...). `benchmarks/operators.py` verifies
all of them against fp64 and times what agrees. A provider that does not take a device, shape or dtype raises its
`DoesNotRun`.
"""
