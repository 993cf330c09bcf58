// Everything before the kernel's own text: what mlx::core::metal::utils() puts there. utils.h and
// bf16.h are MLX's own, from the installed wheel.
#pragma once

#include <metal_stdlib>

#include "mlx/backend/metal/kernels/utils.h"
