def build_info() -> dict[str, str | int]: ...
def source_hashes() -> str: ...
def raise_allocator_thresholds() -> str | None: ...
def fingerprint(block: int, bytes: int, threads: int) -> int: ...
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

# images, pixels, channels, groups, address of weight, of bias, eps
_GroupNorm = tuple[int, int, int, int, int, int, float]

def group_norm_silu_forward(
    norm: _GroupNorm,
    x: int,
    residual: int,
    y: int,
    stats: int,
    given: bool,
    out: int,
    is_bfloat16: bool,
    threads: int,
) -> None: ...
def group_norm_silu_backward(
    norm: _GroupNorm,
    stats: int,
    grad_out: int,
    grad_y: int,
    x: int,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    is_bfloat16: bool,
    threads: int,
) -> None: ...

# only in a build with CUDA
def group_norm_silu_workspace_cuda(norm: _GroupNorm) -> int: ...
def group_norm_silu_forward_cuda(
    device: int,
    stream: int,
    norm: _GroupNorm,
    x: int,
    residual: int,
    y: int,
    stats: int,
    given: bool,
    out: int,
    dtype: int,
    workspace: int,
) -> None: ...
def group_norm_silu_backward_cuda(
    device: int,
    stream: int,
    norm: _GroupNorm,
    stats: int,
    grad_out: int,
    grad_y: int,
    x: int,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    dtype: int,
    workspace: int,
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

# rows, codes, width, z, stride of its rows, codebook, stride of its rows, out
_NearestCode = tuple[int, int, int, int, int, int, int, int]

def nearest_code(call: _NearestCode, is_bfloat16: bool, threads: int) -> None: ...
def nearest_code_cuda(
    device: int, stream: int, call: _NearestCode, splits: int, squares: int, best: int, index: int, dtype: int
) -> None: ...

_PatchGrid = tuple[int, int, int, int, int]  # images, channels, rows, columns, side

def patch_unembed_forward(
    sizes: _PatchGrid, patches: int, bias: int, image: int, is_bfloat16: bool, threads: int
) -> None: ...
def patch_unembed_backward(
    sizes: _PatchGrid, image: int, patches: int, sums: int, is_bfloat16: bool, threads: int
) -> None: ...
def patch_unembed_forward_cuda(
    device: int, stream: int, sizes: _PatchGrid, patches: int, bias: int, image: int, dtype: int
) -> None: ...
def patch_unembed_backward_cuda(
    device: int, stream: int, sizes: _PatchGrid, image: int, patches: int, sums: int, dtype: int
) -> None: ...
def conv3x3(
    sizes: tuple[int, int, int, int, int],  # images, height, width, input channels, output channels
    x: int,
    weight: int,
    panels: int,
    bias: int,
    residual: int,
    out: int,
    groups: int,
    stats: int,
    threads: int,
) -> None: ...

_Upsampled = tuple[int, int, int, int]  # images, height, width, channels

def upsample_conv2x_interleave(
    sizes: _Upsampled, phases: int, bias: int, out: int, groups: int, stats: int, is_bfloat16: bool, threads: int
) -> None: ...
def upsample_conv2x_multiplies_bf16() -> bool: ...
def upsample_conv2x_products(
    sizes: _Upsampled,
    x: int,
    in_channels: int,
    weights: int,
    bias: int,
    out: int,
    groups: int,
    stats: int,
    is_bfloat16: bool,
    threads: int,
) -> None: ...
def upsample_conv2x_split(
    sizes: _Upsampled, grad_out: int, grad_phases: int, grad_bias: int, is_bfloat16: bool, threads: int
) -> None: ...

# only in a build with CUDA
def upsample_conv2x_chunks_cuda(sizes: _Upsampled, dtype: int) -> int: ...
def upsample_conv2x_interleave_cuda(
    device: int,
    stream: int,
    sizes: _Upsampled,
    phases: int,
    bias: int,
    out: int,
    groups: int,
    stats: int,
    scratch: int,
    dtype: int,
) -> None: ...
def upsample_conv2x_split_cuda(
    device: int, stream: int, sizes: _Upsampled, grad_out: int, grad_phases: int, scratch: int, dtype: int
) -> None: ...
