// The first stage: a thread block steps its tile and writes the sums of the tile's rows and columns (lines) to a slice
// of the workspace that is its own.
//
// A thread owns the elements of one 16-byte vector of a row (L of them: 4 in float32, 8 in bfloat16). A row of a tile
// is spread over `group` lanes of a warp, and over `across` warps where it is longer; the block's other lanes and warps
// take other rows. Lanes past a row's end or the last row step zeros, which add nothing.
#pragma once

#include "lines.cuh"
#include "stepper.cuh"

namespace noetherperf {

constexpr int max_across = 4;  // warps that share a row of a tile whose columns are summed
constexpr int row_block = 64;  // rows whose sums are kept in shared memory before they are written

// Which of a tile's 16-byte vectors this thread owns.
struct Place {
  int group;   // lanes of a warp along a row
  int across;  // warps along a row
  int down;    // warps along a column
  int lane, warp_across, warp_down;

  NPERF_D Place(int64_t n_vectors, int64_t n_rows, bool by_col, int n_warps) {
    static_assert(n_holders == 8, "the smallest group");
    group = n_vectors > 16 ? 32 : n_vectors > 8 ? 16 : 8;
    const int64_t strips = (n_vectors + group - 1) / group;
    const int most = by_col ? max_across : n_rows >= 8 ? 1 : n_rows >= 4 ? 2 : n_rows >= 2 ? 4 : 8;
    across = 1;
    while (across < most && across < strips && across < n_warps) across *= 2;
    down = n_warps / across;
    lane = threadIdx.x % 32;
    warp_across = threadIdx.x / 32 % across;
    warp_down = threadIdx.x / 32 / across;
  }

  NPERF_D int vector() const { return warp_across * group + lane % group; }  // among those of a row
  NPERF_D int n_vectors() const { return across * group; }                   // of a row at a time
  NPERF_D int row() const { return warp_down * (32 / group) + lane / group; }
  NPERF_D int n_rows() const { return down * (32 / group); }  // at a time
};

// The sums of a row: a set of slots for each warp that shares it, padded against bank conflicts.
template <class Step>
constexpr int max_row = max_across * n_slots<Step::n_taken> + 1;

constexpr size_t launch_shared = 48 << 10;  // bytes of shared memory that a launch has

// The shared memory of a pipeline of three stages, and of the rows' sums.
template <class Type, class Step>
constexpr size_t with_three_stages =
    3 * sizeof(typename Stepper<Type, Step>::Stage) + row_block * max_row<Step> * sizeof(typename Type::Scalar);

// Pipeline depth: the vectors of each stream that a thread has in flight, and the one that it steps.
template <class Type, class Step>
constexpr int n_stages = is_any<Step>                                     ? 1
                         : with_three_stages<Type, Step> <= launch_shared ? 3
                                                                          : 2;

template <class Type, class Step>
struct TileShared {
  using Scalar = typename Type::Scalar;
  using Stage = typename Stepper<Type, Step>::Stage;
  // Moments of all columns that the threads own, as many as fit into the memory of their vectors.
  static constexpr int n_cols = n_threads<Step> * VectorOf<Type>::L;
  static constexpr int n_col_moments = sizeof(Stage[n_stages<Type, Step>]) / (n_cols * sizeof(Scalar));
  union {
    Stage stages[n_stages<Type, Step>];
    Scalar cols[n_col_moments][n_cols];  // after all vectors are stepped
  };
  Scalar rows[row_block * max_row<Step>];
};

template <class Type, class Step>
struct TileWalk {
  using Rule = typename Step::Rule;
  using Scalar = typename Type::Scalar;
  static constexpr int L = VectorOf<Type>::L, n = Step::n_taken, held = n_held<n>, slots = n_slots<n>;

  const DeviceProblem& problem;
  const Tile& tile;
  const Tensor& tensor;
  const Stepper<Type, Step>& stepper;
  const Place& place;
  TileShared<Type, Step>& shared;
  bool by_row;  // rows are summed; their view is looked up again when they are written, to save registers

  NPERF_D Scalar* row_in_shared(int row) const { return shared.rows + row * (place.across * slots + 1); }

  // Writes a row's sums to shared memory.
  NPERF_D void keep_row(Scalar (&sums)[slots], int row) const {
    sum_over_group<n>(sums, place.group);
    const int spacing = place.group / n_holders;
    if (row >= row_block || place.lane % spacing != 0) return;
    Scalar* const to = row_in_shared(row) + place.warp_across * slots + place.lane % place.group / spacing * held;
#pragma unroll
    for (int k = 0; k < held; ++k) to[k] = sums[k];
  }

  // Writes the sums of n_rows rows from `row` on.
  NPERF_D void write_rows(int64_t row, int n_rows) const {
    __syncthreads();
    const int i = threadIdx.x % row_block;
    for (int m = threadIdx.x / row_block; m < n && i < n_rows; m += n_threads<Step> / row_block) {
      const Scalar* const from = row_in_shared(i) + slot_of<n>(m);
      Scalar sum = from[0];
      for (int a = 1; a < place.across; ++a) sum += from[a * slots];
      lines_of<Rule, Scalar>(problem, problem.views[tensor.view], tensor.n_rows, tile.row_slice, m)[row + i] = sum;
    }
    __syncthreads();
  }

  // Writes the columns' sums. Every row of threads holds a part of each; as many moments at a time as fit.
  NPERF_D void write_cols(const Scalar (&sums)[L][n], const View& view) const {
    constexpr int at_once = TileShared<Type, Step>::n_col_moments;
    const int width = place.n_vectors() * L, n_cols = int(tile.col_end - tile.col_begin);
#pragma unroll
    for (int begin = 0; begin < n; begin += at_once) {
      const int end = n - begin < at_once ? n : begin + at_once;
      __syncthreads();
#pragma unroll
      for (int m = begin; m < end; ++m)
#pragma unroll
        for (int i = 0; i < L; ++i) shared.cols[m - begin][place.row() * width + place.vector() * L + i] = sums[i][m];
      __syncthreads();
      for (int m = begin; m < end; ++m) {
        Scalar* const to = lines_of<Rule, Scalar>(problem, view, tensor.n_cols, tile.col_slice, m) + tile.col_begin;
        for (int i = threadIdx.x; i < n_cols; i += n_threads<Step>) {
          Scalar sum = shared.cols[m - begin][i];
          for (int part = 1; part < place.n_rows(); ++part) sum += shared.cols[m - begin][part * width + i];
          to[i] = sum;
        }
      }
    }
  }

  // Walks row after row, with the row's sums in registers. With by_col the column sums are in registers too; the tile
  // is then not wider than the block.
  template <bool by_col>
  NPERF_D void walk() const {
    constexpr int depth = n_stages<Type, Step>;
    const int n_rows = int(tile.row_end - tile.row_begin), width = int(tile.col_end - tile.col_begin);
    const int first_col = place.vector() * L;
    const int64_t n_cols = tensor.n_cols, first = tile.row_begin * n_cols + tile.col_begin + first_col;

    // A vector that the thread owns: a row of the tile, and how many columns after the thread's first.
    struct Cursor {
      int row, col = 0;
    };
    const auto advance = [&](Cursor& cursor) {
      if (!by_col) {
        cursor.col += place.n_vectors() * L;
        if (cursor.col < width) return;
        cursor.col = 0;
      }
      cursor.row += place.n_rows();
    };
    const auto place_of = [&](const Cursor& cursor) { return first + cursor.row * n_cols + cursor.col; };
    const auto n_inside = [&](const Cursor& cursor) {
      const int left = width - first_col - cursor.col;
      return cursor.row >= n_rows || left <= 0 ? 0 : left < L ? left : L;
    };
    Cursor ahead{place.row()};
    const auto fetch = [&](int stage) {
      stepper.fetch(shared.stages[stage], place_of(ahead), n_inside(ahead));
      __pipeline_commit();
      advance(ahead);
    };

    Scalar col_sums[L][n] = {};
    Cursor here = ahead;
    for (int stage = 0; stage < depth - 1; ++stage) fetch(stage);
    int stage = 0;
    for (int block = 0; block < n_rows; block += row_block) {
      const int block_end = n_rows - block < row_block ? n_rows : block + row_block;
      while (here.row - place.row() < block_end) {
        const int row = here.row;
        Scalar row_sums[slots] = {};
        do {
          fetch(stage == 0 ? depth - 1 : stage - 1);
          __pipeline_wait_prior(depth - 1);
          stepper.step(shared.stages[stage], place_of(here), n_inside(here), col_sums, row_sums);
          stage = stage + 1 == depth ? 0 : stage + 1;
          advance(here);
        } while (here.row == row);
        if (by_row) keep_row(row_sums, row - block);
      }
      if (by_row) write_rows(tile.row_begin + block, block_end - block);
    }
    if (by_col) write_cols(col_sums, problem.views[tensor.view + by_row]);
  }
};

// Blocks per multiprocessor: as many as leave every thread enough registers for its sums and vectors.
template <class Type, class Step>
constexpr int n_blocks() {
  if (is_any<Step>) return 1;
  const bool fewest_sums = sizeof(typename Type::Element) == 4;
  if (n_threads<Step> == 128) return fewest_sums ? 4 : 3;
  return fewest_sums && Step::n_taken <= Step::Rule::n_common ? 3 : 2;
}

// Which kernel steps a tensor: its variant's own, or the one for any.
template <class Rule>
NPERF_D int kernel_of(const Tensor& tensor, int variant) {
  return tensor.dense && variant >= 0 && variant < Rule::n_hot ? variant : Rule::n_hot;
}

template <class Type, class Step>
__global__ void __launch_bounds__(n_threads<Step>, (n_blocks<Type, Step>()))
    step_tiles(const __grid_constant__ DeviceProblem problem, const __grid_constant__ DeviceInputs inputs,
               int64_t tile_begin, int dtype, int kernel) {
  using Rule = typename Step::Rule;
  // References, so that values needed after the loops take no registers inside them.
  const Tile& tile = problem.tiles[tile_begin + blockIdx.x];
  const Tensor& tensor = problem.tensors[tile.tensor];
  // Loaded before any branch depends on them, so that all loads are in flight at once.
  const bool skipped = skips(inputs), part = takes_part<Rule>(inputs, tile.tensor);
  const int variant = variant_in<Rule>(inputs, tensor, tile.tensor);
  const int row = row_number(problem, inputs, tile.tensor, age_in(problem, inputs, tile.tensor));
  if (skipped || !part || tensor.dtype != dtype || kernel != kernel_of<Rule>(tensor, variant)) return;
  if (threadIdx.x == 0 && tile.row_begin == 0 && tile.col_begin == 0) problem.chosen[tile.tensor] = row;
  SHARED(shared, TileShared<Type, Step>);
  const View* const views = problem.views + tensor.view;
  const bool by_row = tensor.n_views > 0 && views[0].by_row, by_col = tensor.n_views > by_row;
  constexpr int L = VectorOf<Type>::L;
  const Stepper<Type, Step> stepper(problem, inputs, tensor, tile.tensor, variant, row_in(problem, inputs, row));
  const Place place((tile.col_end - tile.col_begin + L - 1) / L, tile.row_end - tile.row_begin, by_col,
                    n_threads<Step> / 32);
  const TileWalk<Type, Step> walk{problem, tile, tensor, stepper, place, shared, by_row};
  if (by_col) {
    walk.template walk<true>();
  } else {
    walk.template walk<false>();
  }
}

}  // namespace noetherperf
