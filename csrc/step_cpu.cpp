// The CPU engine: threads over tiles, then over segments.
//
// First stage: every tile steps its block (kernel_cpu.cpp) and writes its sums to its own slice. Each thread starts on
// a contiguous range of tiles, then steals tiles of other ranges. Second stage: for each span of segments, add the
// slices of several tiles in order, and advance the laws. Results do not depend on the threads' schedule.

#include "step_cpu.h"

#include <omp.h>

#include <algorithm>
#include <type_traits>

namespace noetherperf {

namespace {

constexpr int64_t chunk_cols = 16384;  // columns summed by position at a time: 768 KB of float64 sums, for the L2
constexpr int64_t staging_cols = 512;  // of a block that is copied from a tensor without a dense layout
constexpr int64_t staging_rows = 8;
constexpr int64_t elements_worth_a_thread = 65536;  // a start beside busy processes costs a scheduler slice
constexpr int64_t element_size[n_dtypes] = {4, 8, 2, 2};

// One tile's work.
struct Job {
  const Problem& problem;
  const Tile& tile;
  const Tensor& tensor;
  const uint64_t* addresses;  // the tensor's parameter, gradient, buffers
  Scratch& scratch;
  const Kernels& kernels;
  const StepKernels& step;
  const double* row;  // the step's row of numbers
  double unscale;

  void* address(int which) const { return reinterpret_cast<void*>(addresses[which]); }
};

// Where a tile writes its sums of moment m: a slice of the workspace, or the moments if there is only one slice.
double* sums_of(const Problem& problem, int n_moments, const View& view, int64_t slice, int m) {
  if (view.n_slices <= 1) return problem.moments + m * problem.moments_stride + view.segment;
  return problem.workspace + view.workspace + (slice * n_moments + m) * view.n_segments;
}

// Copies rows × width elements between a tensor of any strides and a dense buffer of row length staging_cols.
template <class T, bool gather>
void copy_strided(const Job& job, int which, void* buffer, int64_t row, int64_t rows, int64_t col, int64_t width) {
  const Dim* dims = job.problem.dims + job.tensor.dims;
  T* const base = static_cast<T*>(job.address(which));
  const int n = job.tensor.n_dims;
  for (int64_t r = 0; r < rows; ++r) {
    T* dense = static_cast<T*>(buffer) + r * staging_cols;
    int64_t linear = (row + r) * job.tensor.n_cols + col;
    for (int64_t done = 0; done < width;) {  // a run along the innermost axis at a time
      int64_t rest = (linear + done) / dims[n - 1].size;
      const int64_t inner = (linear + done) % dims[n - 1].size;
      int64_t offset = inner * dims[n - 1].strides[which];
      for (int d = n - 2; d >= 0; --d) {
        offset += rest % dims[d].size * dims[d].strides[which];
        rest /= dims[d].size;
      }
      const int64_t run = std::min(width - done, dims[n - 1].size - inner);
      T* strided = base + offset;
      for (int64_t i = 0; i < run; ++i) {
        if constexpr (gather) {
          dense[done + i] = strided[i * dims[n - 1].strides[which]];
        } else {
          strided[i * dims[n - 1].strides[which]] = dense[done + i];
        }
      }
      done += run;
    }
  }
}

template <bool gather>
void copy_strided(const Job& job, int which, void* buffer, int64_t row, int64_t rows, int64_t col, int64_t width) {
  switch (element_size[job.tensor.dtype]) {
    case 8:
      return copy_strided<uint64_t, gather>(job, which, buffer, row, rows, col, width);
    case 4:
      return copy_strided<uint32_t, gather>(job, which, buffer, row, rows, col, width);
    default:
      return copy_strided<uint16_t, gather>(job, which, buffer, row, rows, col, width);
  }
}

// Steps rows × width elements at (row, col) of the tensor's matrix. `block` holds the coefficients and the addresses of
// the sums.
void step_part(const Job& job, BlockKernel kernel, Block block, int64_t row, int64_t rows, int64_t col, int64_t width) {
  const int64_t size = element_size[job.tensor.dtype];
  block.width = width;
  if (job.tensor.dense) {
    const int64_t at = (row * job.tensor.n_cols + col) * size;
    block.p = static_cast<char*>(job.address(0)) + at;
    block.g = static_cast<const char*>(job.address(1)) + at;
    for (int k = 0; k < job.step.n_read; ++k) block.buffers[k] = static_cast<char*>(job.address(2 + k)) + at;
    block.row_stride = job.tensor.n_cols;
    block.rows = rows;
    return kernel(block);
  }
  const auto staged = [&](int which) { return job.scratch.staging.data() + which * staging_rows * staging_cols; };
  block.p = staged(0);
  block.g = staged(1);
  for (int k = 0; k < job.step.n_read; ++k) block.buffers[k] = staged(2 + k);
  block.row_stride = staging_cols;
  for (int64_t r = 0; r < rows; r += staging_rows) {
    block.rows = std::min(staging_rows, rows - r);
    const auto copy = [&](auto direction, int which) {
      copy_strided<decltype(direction)::value>(job, which, staged(which), row + r, block.rows, col, width);
    };
    const std::true_type gather;
    const std::false_type scatter;
    copy(gather, 0);
    if (job.step.updates) copy(gather, 1);
    for (int k = 0; k < job.step.n_read; ++k) copy(gather, 2 + k);
    kernel(block);
    if (job.step.updates) copy(scatter, 0);
    for (int k = 0; k < job.step.n_written; ++k) copy(scatter, 2 + k);
    if (block.row_sums != nullptr) block.row_sums += block.rows;
    block.fresh = false;
  }
}

// Whether each position of the matrix is a segment of its own.
bool is_positions(const View& view, const Tensor& tensor) { return view.n_segments == tensor.n_cols; }

// Copies one moment's sums of positions [0, width) out of every n_acc-th line.
void gather_positions(const Line* lines, int n_acc, int64_t width, double* to) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8, lines += n_acc) std::copy_n(lines->at, 8, to + i);
  std::copy_n(lines->at, width - i, to + i);
}

// Adds the sums of positions [col, col + width) to the sums of their segments.
void fold_positions(const View& view, int64_t col, int64_t width, const double* positions, double* sums) {
  int64_t segment = col / view.inner % view.n_segments, left = view.inner - col % view.inner;
  for (int64_t i = 0; view.inner == 1 && i < width; segment = 0) {  // each run is all segments once
    const int64_t run = std::min(view.n_segments - segment, width - i);
    for (int64_t j = 0; j < run; ++j) sums[segment + j] += positions[i + j];
    i += run;
  }
  for (int64_t i = 0; view.inner != 1 && i < width;) {  // a segment's run of positions at a time
    const int64_t run = std::min(left, width - i);
    double sum = 0.0;
    for (int64_t j = 0; j < run; ++j) sum += positions[i + j];
    sums[segment] += sum;
    i += run;
    left = view.inner;
    if (++segment == view.n_segments) segment = 0;
  }
}

// Steps one tile and writes its sums: straight to the moments, or to its slices of the workspace.
void run_tile(const Job& job) {
  const Tile& tile = job.tile;
  const Tensor& tensor = job.tensor;
  const View* const views = job.problem.views + tensor.view;
  const bool by_row = tensor.n_views > 0 && views[0].by_row;
  const View* const col_views = views + by_row;
  const int n_col_views = tensor.n_views - by_row;
  const int64_t rows = tile.row_end - tile.row_begin;
  const int n_acc = job.step.n_taken;
  const BlockKernel kernel = job.step.of(tensor.dtype, by_row, n_col_views > 0);

  Block block{};
  block.row = job.row;
  block.unscale = job.unscale;
  if (by_row) {
    block.row_sums = job.scratch.row_sums.data();
    block.row_sums_stride = rows;
    std::fill_n(block.row_sums, n_acc * rows, 0.0);
  }
  if (n_col_views > 0) {
    block.col_sums = job.scratch.col_sums.data();
    block.block_lines = job.scratch.block_lines.data();
  }

  // Clears the segments of this tile's slice to which position sums are added.
  for (int k = 0; k < n_col_views; ++k) {
    const View& view = col_views[k];
    if (is_positions(view, tensor)) continue;
    const bool repeats = view.inner * view.n_segments != tensor.n_cols;
    const int64_t begin = repeats ? 0 : tile.col_begin / view.inner;
    const int64_t end = repeats ? view.n_segments : (tile.col_end + view.inner - 1) / view.inner;
    for (int m = 0; m < n_acc; ++m) {
      double* const sums = sums_of(job.problem, job.kernels.n_moments, view, tile.col_slice, m);
      std::fill(sums + begin, sums + end, 0.0);
    }
  }

  // Columns are walked in equal chunks, as wide as the sums by position allow: short contiguous runs are slow.
  const int64_t cols = tile.col_end - tile.col_begin;
  const int64_t widest = !tensor.dense ? staging_cols : n_col_views > 0 ? chunk_cols : cols;
  const int64_t n_chunks = (cols + widest - 1) / widest;
  const int64_t chunk = std::min(((cols + n_chunks - 1) / n_chunks + 63) / 64 * 64, widest);
  for (int64_t col = tile.col_begin; col < tile.col_end;) {
    const int64_t width = std::min(chunk, tile.col_end - col);
    block.fresh = true;
    step_part(job, kernel, block, tile.row_begin, rows, col, width);
    for (int k = 0; k < n_col_views; ++k) {
      const View& view = col_views[k];
      for (int m = 0; m < n_acc; ++m) {
        double* const sums = sums_of(job.problem, job.kernels.n_moments, view, tile.col_slice, m);
        if (is_positions(view, tensor)) {
          gather_positions(block.col_sums + m, n_acc, width, sums + col);
        } else {
          gather_positions(block.col_sums + m, n_acc, width, job.scratch.positions.data());
          fold_positions(view, col, width, job.scratch.positions.data(), sums);
        }
      }
    }
    col += width;
  }

  if (by_row) {
    const View& view = views[0];
    const int64_t begin = tile.row_begin / view.inner, n = (rows + view.inner - 1) / view.inner;
    for (int m = 0; m < n_acc; ++m) {
      double* const sums = sums_of(job.problem, job.kernels.n_moments, view, tile.row_slice, m) + begin;
      const double* const from = block.row_sums + m * rows;
      if (view.inner == 1) std::copy_n(from, n, sums);
      for (int64_t i = 0; i < n && view.inner != 1; ++i) {
        double sum = 0.0;
        for (int64_t j = i * view.inner; j < std::min((i + 1) * view.inner, rows); ++j) sum += from[j];
        sums[i] = sum;
      }
    }
  }
}

// Sets the moments [begin, end) of a span to zero.
void clear_moments(const Problem& problem, const View& view, const Span& span, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    double* const to = problem.moments + m * problem.moments_stride + view.segment;
    std::fill(to + span.begin, to + span.end, 0.0);
  }
}

// Adds the slices of several tiles in order.
void gather_slices(const Problem& problem, int n_moments, const View& view, const Span& span, int n_acc) {
  for (int m = 0; m < n_acc; ++m) {
    double* const to = problem.moments + m * problem.moments_stride + view.segment;
    std::fill(to + span.begin, to + span.end, 0.0);
    for (int64_t slice = 0; slice < view.n_slices; ++slice) {
      const double* const from = sums_of(problem, n_moments, view, slice, m);
      for (int64_t i = span.begin; i < span.end; ++i) to[i] += from[i];
    }
  }
}

// Multiplies sums of these moments by `unscale`, once for each gradient in their product.
void unscale_moments(const Problem& problem, const Moment* moments, const View& view, const Span& span, int n_acc,
                     double unscale) {
  for (int m = 0; m < n_acc; ++m) {
    const int degree = moments[m].degree_in_gradient();
    if (degree == 0) continue;
    double* const sums = problem.moments + m * problem.moments_stride + view.segment;
    const double factor = degree == 2 ? unscale * unscale : unscale;
    for (int64_t i = span.begin; i < span.end; ++i) sums[i] *= factor;
  }
}

}  // namespace

Engine::Engine(const Problem& problem, const Kernels& kernels)
    : problem_(problem),
      kernels_(kernels),
      n_tiles_(problem.n_tensors, 0),
      n_taken_(problem.n_tensors, kernels.n_moments) {
  for (int64_t i = 0; i < problem.n_tiles; ++i) {
    const Tile& tile = problem.tiles[i];
    max_tile_rows_ = std::max(max_tile_rows_, tile.row_end - tile.row_begin);
    n_elements_ += (tile.row_end - tile.row_begin) * (tile.col_end - tile.col_begin);
    ++n_tiles_[tile.tensor];
  }
}

void Engine::step(const Inputs& inputs, int n_threads) { run<false>(inputs, n_threads); }
void Engine::measure(const Inputs& inputs, int n_threads) { run<true>(inputs, n_threads); }

// Combines the moments of a span and advances its laws. The pass that only measures does not advance laws.
void Engine::finish(const Inputs& inputs, const Span& span, const StepKernels& step) {
  const View& view = problem_.views[span.view];
  const int n_acc = step.n_taken;
  if (view.n_slices != 1) gather_slices(problem_, kernels_.n_moments, view, span, n_acc);
  if (n_acc < n_taken_[view.tensor]) clear_moments(problem_, view, span, n_acc, kernels_.n_moments);
  if (!step.updates) return;
  if (inputs.unscale != 1.0) unscale_moments(problem_, kernels_.moments, view, span, n_acc, inputs.unscale);
  const double* const moments = problem_.moments + view.segment;
  const int64_t row = inputs.row_of[view.tensor];
  const int64_t starts[n_laws] = {view.translation, view.norm};
  for (int64_t i = 0; i < problem_.n_components; ++i) {
    const Component& component = problem_.components[i];
    const int64_t start = starts[component.law], stride = problem_.states_stride[component.law];
    if (start < 0) continue;
    const Recursion& recursion = recursions_[row * problem_.n_components + i];
    (*kernels_.advance)(recursion)(recursion, problem_.states[component.law] + component.row * stride + start, stride,
                                   moments, problem_.moments_stride, span.begin, span.end);
  }
  if (span.begin == 0 && span.view == problem_.tensors[view.tensor].view)
    propagate(problem_.propagators + view.tensor * n_laws * n_propagated * 4, inputs.rows + row * problem_.n_numbers,
              problem_.law_numbers);
}

template <bool measuring>
void Engine::run(const Inputs& inputs, int n_threads) {
  const Problem& problem = problem_;
  const int n_columns = 2 + kernels_.n_buffers;  // of the addresses
  // A thread with little work saves less time than its start takes.
  n_threads = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, n_elements_ / elements_worth_a_thread)));
  if (int(ranges_.size()) < n_threads) {
    ranges_ = std::vector<Range>(n_threads);
    scratch_.resize(n_threads);
    for (Scratch& scratch : scratch_) {
      scratch.row_sums.resize(kernels_.n_moments * max_tile_rows_);
      scratch.col_sums.resize(n_lines(chunk_cols, kernels_.n_moments));
      scratch.block_lines.resize(n_block_lines(chunk_cols, kernels_.n_moments));
      scratch.positions.resize(chunk_cols);
      scratch.staging.resize(n_columns * staging_rows * staging_cols);
    }
  }
  if (!measuring && problem.n_spans > 0) {
    recursions_.clear();
    for (int64_t row = 0; row < inputs.n_rows; ++row)
      for (int64_t i = 0; i < problem.n_components; ++i) {
        const Component& component = problem.components[i];
        recursions_.push_back(recursion_of(component, problem.driving + component.moments,
                                           inputs.rows + row * problem.n_numbers + component.numbers));
      }
  }
  for (int i = 0; i < n_threads; ++i) {
    ranges_[i].next = problem.n_tiles * i / n_threads;
    ranges_[i].end = problem.n_tiles * (i + 1) / n_threads;
  }

  const auto step_of = [&](int64_t i) -> const StepKernels& {
    if (measuring) return kernels_.measure;
    const Tensor& tensor = problem.tensors[i];
    const bool has_buffer = kernels_.n_buffers > 0 && inputs.addresses[n_columns * i + 2] != 0;
    return kernels_.steps[kernels_.variant_of(inputs.groups[tensor.group].variant, has_buffer, tensor.n_views > 0)];
  };
  const auto takes_part = [&](int64_t i) { return measuring || inputs.addresses[n_columns * i + 1] != 0; };

#pragma omp parallel num_threads(n_threads)
  {
    const int me = omp_get_thread_num();
    for (int k = 0; k < n_threads; ++k) {  // the thread's own range first, then the rest of the others
      Range& range = ranges_[(me + k) % n_threads];
      for (int64_t t; (t = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
        const Tile& tile = problem.tiles[t];
        if (!takes_part(tile.tensor)) continue;
        const Tensor& tensor = problem.tensors[tile.tensor];
        const StepKernels& step = step_of(tile.tensor);
        const double* const row = measuring ? nullptr : inputs.rows + inputs.row_of[tile.tensor] * problem.n_numbers;
        run_tile({problem, tile, tensor, inputs.addresses + n_columns * tile.tensor, scratch_[me], kernels_, step, row,
                  inputs.unscale});
        if (n_tiles_[tile.tensor] == 1)  // no other tile adds to its segments: finish them while they are cached
          for (int32_t v = tensor.view; v < tensor.view + tensor.n_views; ++v)
            finish(inputs, {0, problem.views[v].n_segments, v, 0}, step);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t s = 0; s < problem.n_spans; ++s) {
      const Span& span = problem.spans[s];
      const int32_t tensor = problem.views[span.view].tensor;
      if (!takes_part(tensor)) {  // charges stay, moments of gradient and update are zero, laws do not advance
        clear_moments(problem, problem.views[span.view], span, kernels_.n_kept, kernels_.n_moments);
      } else if (n_tiles_[tensor] != 1) {
        finish(inputs, span, step_of(tensor));
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < problem.n_tensors; ++i)
      n_taken_[i] = uint8_t(takes_part(i) ? step_of(i).n_taken : kernels_.n_kept);
  }
}

}  // namespace noetherperf
