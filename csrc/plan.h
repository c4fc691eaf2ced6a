// Plain structs of the plan's tables; mirrors of the dtypes in noetherperf/engines/tiling.py, where the fields are
// explained.
#pragma once

#include <cstdint>

namespace noetherperf {

enum Dtype : int32_t { float32, float64, bfloat16, float16 };

struct Tensor {
  int64_t n_rows, n_cols, dims;
  int32_t n_dims, dense, dtype, group, view, n_views;
};

constexpr int most_buffers = 3;  // of a rule

struct Dim {
  int64_t size;
  int64_t strides[2 + most_buffers];  // of parameter, gradient, buffers
};

struct View {
  int32_t tensor, by_row;
  int64_t inner, n_segments, segment, translation, norm, n_slices, workspace;
};

struct Tile {
  int64_t row_begin, row_end, col_begin, col_end;
  int32_t tensor, row_slice, col_slice, padding;
};

struct Span {
  int64_t begin, end;
  int32_t view, tensor;
};

}  // namespace noetherperf
