def build_info() -> dict[str, str | int]: ...
def raise_allocator_thresholds() -> str | None: ...
def crop_resize(
    image: int, height: int, width: int, row_stride: int, boxes: int, flips: int, count: int, size: int, out: int
) -> None: ...

_LowrankSizes = tuple[int, ...]  # images, patches, tokens, key width, value width
_Matrices = tuple[int, bool, int, int]  # address, whether bf16 rather than fp32, image stride, row stride

def lowrank_product_forward(
    sizes: _LowrankSizes,
    query: _Matrices,
    key: _Matrices,
    value: _Matrices,
    bias: int,
    temperature: float,
    out: int,
    localization: int,
    peak: int,
    logits: int,
    query_scale: int,
    key_scale: int,
    threads: int,
) -> None: ...
def lowrank_product_backward(
    sizes: _LowrankSizes,
    grad_out: _Matrices,
    grad_localization: int,
    query: _Matrices,
    key: _Matrices,
    value: _Matrices,
    logits: int,
    query_scale: int,
    key_scale: int,
    temperature: float,
    grad_query: int,
    grad_key: int,
    grad_value: int,
    threads: int,
) -> None: ...

_Rows = tuple[int, bool, int]  # address, whether bf16 rather than fp32, row stride

def add_layer_norm_forward(
    count: int,
    width: int,
    x: _Rows,
    residual: _Rows,
    weight: int,
    bias: int,
    eps: float,
    total: int,
    normed: _Rows,
    mean: int,
    rstd: int,
    threads: int,
) -> None: ...
def add_layer_norm_backward(
    count: int,
    width: int,
    grad_normed: _Rows,
    grad_total: _Rows,
    total: _Rows,
    weight: int,
    mean: int,
    rstd: int,
    grad: int,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
) -> None: ...

# logits, whether bf16 rather than fp32, row stride, row and column potentials, temperature, classes, index
_PrototypeTargets = tuple[int, bool, int, int, int, float, int, int]

def prototype_cross_entropy_rows(
    count: int,
    prototypes: int,
    logits: int,
    is_bfloat16: bool,
    targets: _PrototypeTargets,
    temperature: float,
    weights: int,
    loss: int,
    threads: int,
) -> None: ...

# address, whether bf16 rather than fp32, row stride, rows, columns, temperature
_SinkhornLogits = tuple[int, bool, int, int, int, float]

def sinkhorn_columns(logits: _SinkhornLogits, peaks: int, sums: int, parts: int) -> None: ...
def sinkhorn_rows(
    logits: _SinkhornLogits, column: int, row: int, sums: int, out: int, entropy: int, first: int, parts: int
) -> None: ...
def gelu_forward(x: int, out: int, count: int, is_bfloat16: bool, threads: int) -> None: ...
def gelu_backward(x: int, grad: int, grad_x: int, out: int, count: int, is_bfloat16: bool, threads: int) -> None: ...
def transpose(
    matrix: int, stride: int, rows: int, columns: int, out: int, sums: int, is_bfloat16: bool, threads: int
) -> None: ...

# address, whether bf16 rather than fp32, image stride, view stride, token stride
_Tokens = tuple[int, bool, int, int, int]

def token_match(
    images: int,
    views: int,
    tokens: int,
    width: int,
    pred: _Tokens,
    target: _Tokens,
    keep: int,
    epsilon: float,
    iterations: int,
    index: int,
    plan: int,
    threads: int,
) -> None: ...
def koleo_forward(
    images: int,
    tokens: int,
    width: int,
    x: _Tokens,
    min_distance: float,
    index: int,
    distance: int,
    norm: int,
    threads: int,
) -> float: ...
def koleo_backward(
    images: int,
    tokens: int,
    width: int,
    x: _Tokens,
    min_distance: float,
    index: int,
    distance: int,
    norm: int,
    grad_loss: float,
    grad_x: int,
    threads: int,
) -> None: ...
