// The CUDA engine: one thread block a tile, then one a span of segments.
//
// First stage: a block steps its tile and writes the sums of the tile's rows and columns (lines) to a slice of the
// workspace of its own. Second stage: blocks add the slices' lines to segments, in an order that shapes alone decide,
// in float64, and advance the laws by the transitions that another kernel has found when the hyperparameters last
// changed. No atomics, so runs agree bit for bit. Bytes, registers and bytes in flight are counted in
// docs/performance.md; tests/cuda_emulation executes this file on a CPU.
//
// A thread owns the elements of one 16-byte vector of a row (L of them: 4 in float32, 8 in bfloat16). A row of a tile
// is spread over `group` lanes of a warp, and over `across` warps where it is longer; the block's other lanes and warps
// take other rows. Lanes past a row's end or the last row step zeros, which add nothing. While a thread steps a vector
// its next ones are on their way to shared memory, each to a place of the thread's own, so that no one waits for
// others.

#include "step_cuda.h"

#include <cstring>
#include <stdexcept>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, stream, ...) \
  (kernel)<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SHARED(name, ...) __shared__ __VA_ARGS__ name
#define NPERF_D __device__ __forceinline__
#else
#include "cuda_emulation.h"
#define NPERF_D inline
#endif

namespace noetherperf {
namespace {

constexpr int n_threads = 256, n_warps = n_threads / 32;
constexpr int n_finishers = 64;  // threads of a block of the second stage
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int max_across = 4;  // warps that share a row of a tile whose columns are summed
constexpr int row_block = 64;  // rows whose sums are kept in shared memory before they are written
constexpr int n_slots = 8;     // of a row's sums there: one for every moment

// ---- storage types: what lies in memory (Element), what it is computed in (Scalar), and the way between the two -----

struct Float32 {
  using Element = float;
  using Scalar = float;
  static NPERF_D Scalar widen(Element x) { return x; }
  static NPERF_D Element narrow(Scalar x) { return x; }
};

struct Float64 {
  using Element = double;
  using Scalar = double;
  static NPERF_D Scalar widen(Element x) { return x; }
  static NPERF_D Element narrow(Scalar x) { return x; }
};

template <class To, class From>
NPERF_D To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct BFloat16 {
  using Element = uint16_t;
  using Scalar = float;
  static NPERF_D Scalar widen(Element x) { return bits_as<float>(uint32_t(x) << 16); }
  static NPERF_D Element narrow(Scalar x) {
#if defined(__CUDACC__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bits_as<uint32_t>(x);
    return Element((x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  }
};

struct Float16 {
  using Element = uint16_t;
  using Scalar = float;
#if defined(__CUDACC__)
  static NPERF_D Scalar widen(Element x) { return __half2float(__ushort_as_half(x)); }
  static NPERF_D Element narrow(Scalar x) { return __half_as_ushort(__float2half_rn(x)); }
#else
  static NPERF_D Scalar widen(Element x) { return bits_as<_Float16>(x); }
  static NPERF_D Element narrow(Scalar x) { return bits_as<Element>(_Float16(x)); }
#endif
};

// ---- what a step reads before it begins -----------------------------------------------------------------------------

template <int variant>
constexpr int n_sums = variant == any ? n_moments : n_accumulated(Mode(variant));

NPERF_D bool skips(const Inputs& inputs) {
  const uint64_t found_inf = inputs.scalars[1];
  return found_inf != 0 && *reinterpret_cast<const float*>(found_inf) != 0.0f;
}

NPERF_D bool takes_part(const Inputs& inputs, int64_t tensor) {
  return inputs.measuring || inputs.addresses[3 * tensor + 1] != 0;
}

NPERF_D Mode mode_in(const Inputs& inputs, const Tensor& tensor, int64_t i) {
  if (inputs.measuring) return Mode::measure;
  return mode_of(inputs.hypers[tensor.hyper], inputs.addresses[3 * i + 2] != 0, tensor.n_views > 0);
}

NPERF_D Hyper hyper_in(const Inputs& inputs, int64_t group) {
  Hyper hyper = inputs.hypers[group];
  const DeviceLr lr = inputs.lrs[group];
  if (lr.address != 0)
    hyper.lr = lr.dtype == float64 ? *reinterpret_cast<const double*>(lr.address)
                                   : double(*reinterpret_cast<const float*>(lr.address));
  return hyper;
}

// Which of a tile's 16-byte vectors this thread owns.
struct Place {
  int group;   // lanes of a warp along a row
  int across;  // warps along a row
  int down;    // warps along a column
  int lane, warp_across, warp_down;

  NPERF_D Place(int64_t n_vectors, int64_t n_rows, bool by_col) {
    group = n_vectors > 16 ? 32 : n_vectors > 8 ? 16 : 8;
    const int64_t strips = (n_vectors + group - 1) / group;
    const int most = by_col ? max_across : n_rows >= 8 ? 1 : n_rows >= 4 ? 2 : n_rows >= 2 ? 4 : 8;
    across = 1;
    while (across < most && across < strips) across *= 2;
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

// ---- sums over the lanes that share a row ---------------------------------------------------------------------------

// Halves n values over two lanes: the lower lane keeps the first half of both lanes' sums, the upper one the rest.
template <int n, class S>
NPERF_D void halve(S (&values)[n_slots], int offset) {
  constexpr int half = (n + 1) / 2;
  const bool upper = threadIdx.x & offset;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const S low = values[k], high = k + half < n ? values[k + half] : S(0);
    values[k] = (upper ? high : low) + __shfl_xor_sync(all_lanes, upper ? low : high, offset);
  }
}

// Sums n values over a group of lanes, all at once: 8 shuffles for 6 values where one by one they would take 30.
// Afterwards every lane group / 8 · slot holds the sum that belongs to this slot.
template <int n, class S>
NPERF_D S sum_over_group(S (&values)[n_slots], int group) {
  halve<n>(values, group / 2);
  halve<(n + 1) / 2>(values, group / 4);
  halve<((n + 1) / 2 + 1) / 2>(values, group / 8);
  for (int offset = group / 16; offset > 0; offset /= 2) values[0] += __shfl_xor_sync(all_lanes, values[0], offset);
  return values[0];
}

// The slot where sum_over_group leaves value m of n.
template <int n>
NPERF_D int slot_of(int m) {
  constexpr int half = (n + 1) / 2, quarter = (half + 1) / 2;
  return m / half * 4 + m % half / quarter * 2 + m % half % quarter;
}

// ---- one vector of elements: loaded, stepped, stored ----------------------------------------------------------------

template <class Type>
struct alignas(16) VectorOf {
  static constexpr int L = 16 / sizeof(typename Type::Element);
  typename Type::Element x[L];
};

// How many vectors of p, g and v a thread has on their way or in hand.
template <class Type, int variant>
constexpr int n_stages = variant == any                        ? 1
                         : sizeof(typename Type::Element) == 8 ? 2
                                                               : 3;

template <class Type, int variant>
struct Shared {
  using Scalar = typename Type::Scalar;
  static constexpr int max_row = max_across * n_slots + 1;  // not a multiple of the banks
  // As many moments of all columns that threads own as fit in the place of their vectors.
  static constexpr int n_cols = n_threads * VectorOf<Type>::L;
  static constexpr int n_col_moments =
      sizeof(VectorOf<Type>[n_stages<Type, variant>][3][n_threads]) / (n_cols * sizeof(Scalar));
  union {
    VectorOf<Type> stages[n_stages<Type, variant>][3][n_threads];
    Scalar cols[n_col_moments][n_cols];  // when all vectors are stepped
  };
  Scalar rows[row_block * max_row];
};

template <class Type, int variant>
struct Stepper {
  using Element = typename Type::Element;
  using Scalar = typename Type::Scalar;
  using Vector = VectorOf<Type>;
  static constexpr int L = Vector::L;
  using Stage = Vector[3][n_threads];

  Element *p, *g, *v;
  Coefficients<Scalar> c;
  Scalar inverse_scale;
  bool scaled;
  bool aligned;  // whole vectors may be loaded as such
  Mode mode;
  const Tensor& tensor;
  const Dim* dims;

  NPERF_D Stepper(const Problem& problem, const Inputs& inputs, const Tensor& its, int64_t i, Mode its_mode)
      : mode(its_mode), tensor(its), dims(problem.dims + its.dims) {
    const uint64_t* const addresses = inputs.addresses + 3 * i;
    p = on_device(addresses, 0);
    g = on_device(addresses, 1);
    v = on_device(addresses, 2);
    aligned = (addresses[0] | addresses[1] | addresses[2]) % 16 == 0 && (its.n_rows == 1 || its.n_cols % L == 0);
    scaled = inputs.scaled;
    inverse_scale = scaled ? Scalar(1.0 / double(*reinterpret_cast<const float*>(inputs.scalars[0]))) : Scalar(1);
    const bool first = problem.fresh[i] | inputs.first[i];
    const Coefficients<double> wide =
        mode == Mode::measure ? Coefficients<double>{} : coefficients(hyper_in(inputs, its.hyper), first);
    c = {Scalar(wide.lr),          Scalar(wide.decay), Scalar(wide.sign), Scalar(wide.buffer_decay),
         Scalar(wide.buffer_gain), Scalar(wide.mix_d), Scalar(wide.mix_v)};
    if (variant == int(Mode::nesterov)) c.mix_v = c.buffer_decay;  // both are β: one register
  }

  static NPERF_D Element* on_device(const uint64_t* addresses, int which) {
    void* const pointer = reinterpret_cast<void* const*>(addresses)[which];
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));  // what comes from a table could point to any memory
#endif
    return static_cast<Element*>(pointer);
  }

  NPERF_D constexpr Mode its_mode() const {
    if constexpr (variant == any) return mode;
    return Mode(variant);
  }

  // Where element `at` of the matrix lies.
  NPERF_D int64_t offset(int64_t at, int64_t Dim::* stride) const {
    if constexpr (variant != any) return at;
    if (tensor.dense) return at;
    int64_t sum = 0;
    for (int d = tensor.n_dims - 1; d >= 0; --d) {
      sum += at % dims[d].size * (dims[d].*stride);
      at /= dims[d].size;
    }
    return sum;
  }

  // Element by element: those from `at` on, zeros past the n-th.
  NPERF_D void load(Vector& x, const Element* from, int64_t at, int n, int64_t Dim::* stride) const {
#pragma unroll
    for (int i = 0; i < L; ++i) x.x[i] = i < n ? from[offset(at + i, stride)] : Element(0);
  }

  NPERF_D void store(const Vector& x, Element* to, int64_t at, int n, int64_t Dim::* stride) const {
#pragma unroll
    for (int i = 0; i < L; ++i)
      if (i < n) to[offset(at + i, stride)] = x.x[i];
  }

  // Whether the n elements from `at` on are a vector in memory.
  NPERF_D bool whole(int n) const { return variant != any && aligned && n == L; }

  // Sends for the n elements from `at` on, where they are a vector.
  NPERF_D void fetch(Stage& stage, int64_t at, int n) const {
    if (!whole(n)) return;
    __pipeline_memcpy_async(&stage[0][threadIdx.x], p + at, 16);
    __pipeline_memcpy_async(&stage[1][threadIdx.x], g + at, 16);
    if (reads_buffer(its_mode())) __pipeline_memcpy_async(&stage[2][threadIdx.x], v + at, 16);
  }

  // Steps n elements from `at` on and adds them to the sums of their columns and of their row.
  NPERF_D void step(const Stage& stage, int64_t at, int n, Scalar (&col_sums)[L][n_sums<variant>],
                    Scalar (&row_sums)[n_slots]) const {
    const bool measures = its_mode() == Mode::measure;
    Vector x, y, z;
    if (whole(n)) {
      x = stage[0][threadIdx.x];
      y = stage[1][threadIdx.x];
      if (reads_buffer(its_mode())) z = stage[2][threadIdx.x];
    } else {
      load(x, p, at, n, &Dim::stride_p);
      if (!measures) load(y, g, at, n, &Dim::stride_g);
      if (measures || reads_buffer(its_mode())) load(z, v, at, n, &Dim::stride_v);
    }
#pragma unroll
    for (int i = 0; i < L; ++i) element(x.x[i], y.x[i], z.x[i], col_sums[i], row_sums);
    if (whole(n)) {
      *reinterpret_cast<Vector*>(p + at) = x;
      if (scaled) *reinterpret_cast<Vector*>(g + at) = y;
      if (writes_buffer(its_mode())) *reinterpret_cast<Vector*>(v + at) = z;
    } else {
      if (!measures) store(x, p, at, n, &Dim::stride_p);
      if (scaled) store(y, g, at, n, &Dim::stride_g);
      if (writes_buffer(its_mode())) store(z, v, at, n, &Dim::stride_v);
    }
  }

  // Steps one element and adds it to the sums of its column and its row.
  template <Mode of>
  NPERF_D void element(Element& x, Element& y, Element& z, Scalar* col_sums, Scalar* row_sums) const {
    Scalar p_new = Type::widen(x), v_new = 0, u = 0;
    const Scalar p_old = p_new;
    if constexpr (of == Mode::measure) {
      const Scalar stands_in = Type::widen(z);
      accumulate<of>(col_sums, p_old, p_old, stands_in, u, v_new);
      accumulate<of>(row_sums, p_old, p_old, stands_in, u, v_new);
      return;
    }
    const Scalar gradient = Type::widen(y) * inverse_scale;
    if constexpr (reads_buffer(of)) v_new = Type::widen(z);
    update<of>(p_new, gradient, v_new, u, c);
    x = Type::narrow(p_new);
    y = Type::narrow(gradient);
    if constexpr (writes_buffer(of)) z = Type::narrow(v_new);
    const Scalar stored = Type::widen(x);
    accumulate<of>(col_sums, stored, p_old, gradient, u, v_new);
    accumulate<of>(row_sums, stored, p_old, gradient, u, v_new);
  }

  NPERF_D void element(Element& x, Element& y, Element& z, Scalar* col_sums, Scalar* row_sums) const {
    if constexpr (variant != any) {
      element<Mode(variant)>(x, y, z, col_sums, row_sums);
    } else {
      switch (mode) {
        case Mode::plain:
          return element<Mode::plain>(x, y, z, col_sums, row_sums);
        case Mode::momentum:
          return element<Mode::momentum>(x, y, z, col_sums, row_sums);
        case Mode::nesterov:
          return element<Mode::nesterov>(x, y, z, col_sums, row_sums);
        case Mode::stale:
          return element<Mode::stale>(x, y, z, col_sums, row_sums);
        case Mode::measure:
          return element<Mode::measure>(x, y, z, col_sums, row_sums);
      }
    }
  }
};

// ---- one tile -------------------------------------------------------------------------------------------------------

// Where the sums of moment m over a view's lines begin: a slice of the workspace, in the type they were summed in.
template <class Scalar>
NPERF_D Scalar* lines_of(const Problem& problem, const View& view, int64_t n_lines, int64_t slice, int m) {
  return reinterpret_cast<Scalar*>(problem.workspace + view.workspace) + (slice * n_moments + m) * n_lines;
}

template <class Type, int variant>
struct TileWalk {
  using Scalar = typename Type::Scalar;
  static constexpr int L = Stepper<Type, variant>::L, n = n_sums<variant>;

  const Problem& problem;
  const Tile& tile;
  const Tensor& tensor;
  const Stepper<Type, variant>& stepper;
  const Place& place;
  Shared<Type, variant>& shared;
  bool by_row;  // rows are summed; their view is found again when they are written, for registers are scarce

  NPERF_D Scalar* row_in_shared(int row) const { return shared.rows + row * (place.across * n_slots + 1); }

  // Leaves a row's sums in shared memory.
  NPERF_D void keep_row(Scalar (&sums)[n_slots], int row) const {
    const Scalar sum = sum_over_group<n>(sums, place.group);
    const int spacing = place.group / n_slots;
    if (row < row_block && place.lane % spacing == 0)
      row_in_shared(row)[place.warp_across * n_slots + place.lane % place.group / spacing] = sum;
  }

  // Writes the sums of n_rows rows from `row` on.
  NPERF_D void write_rows(int64_t row, int n_rows) const {
    __syncthreads();
    const int i = threadIdx.x % row_block;
    for (int m = threadIdx.x / row_block; m < n && i < n_rows; m += n_threads / row_block) {
      const Scalar* const from = row_in_shared(i) + slot_of<n>(m);
      Scalar sum = from[0];
      for (int a = 1; a < place.across; ++a) sum += from[a * n_slots];
      lines_of<Scalar>(problem, problem.views[tensor.view], tensor.n_rows, tile.row_slice, m)[row + i] = sum;
    }
    __syncthreads();
  }

  // Writes the columns' sums, of which every row of threads holds a part; as many moments at a time as there is room.
  NPERF_D void write_cols(const Scalar (&sums)[L][n], const View& view) const {
    constexpr int at_once = Shared<Type, variant>::n_col_moments;
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
        Scalar* const to = lines_of<Scalar>(problem, view, tensor.n_cols, tile.col_slice, m) + tile.col_begin;
        for (int i = threadIdx.x; i < n_cols; i += n_threads) {
          Scalar sum = shared.cols[m - begin][i];
          for (int part = 1; part < place.n_rows(); ++part) sum += shared.cols[m - begin][part * width + i];
          to[i] = sum;
        }
      }
    }
  }

  // Row after row, with the sums of a row in registers, and those of the columns of a tile not wider than the block.
  template <bool by_col>
  NPERF_D void walk() const {
    constexpr int depth = n_stages<Type, variant>;
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
        Scalar row_sums[n_slots] = {};
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

// Blocks on a multiprocessor at a time: as many as leave every thread the registers for its sums.
template <class Type, int variant>
constexpr int n_blocks() {
  if (variant == any) return 1;
  return sizeof(typename Type::Element) == 4 && variant != int(Mode::nesterov) ? 3 : 2;
}

template <class Type, int variant>
__global__ void __launch_bounds__(n_threads, (n_blocks<Type, variant>()))
    step_tiles(const __grid_constant__ Problem problem, const __grid_constant__ Inputs inputs, int64_t tile_begin,
               int dtype) {
  // References: what is needed after the loops shall not take registers inside them.
  const Tile& tile = problem.tiles[tile_begin + blockIdx.x];
  const Tensor& tensor = problem.tensors[tile.tensor];
  // Before anything depends on them, so that no load waits for a decision.
  const bool skipped = skips(inputs), part = takes_part(inputs, tile.tensor);
  const Mode mode = mode_in(inputs, tensor, tile.tensor);
  if (skipped || !part || tensor.dtype != dtype) return;
  if (variant != (tensor.dense && int(mode) < any ? int(mode) : any)) return;
  if (threadIdx.x == 0 && tile.row_begin == 0 && tile.col_begin == 0)
    problem.pending[tile.tensor] = problem.fresh[tile.tensor] | inputs.first[tile.tensor];
  SHARED(shared, Shared<Type, variant>);
  const View* const views = problem.views + tensor.view;
  const bool by_row = tensor.n_views > 0 && views[0].by_row, by_col = tensor.n_views > by_row;
  using Step = Stepper<Type, variant>;
  const Step stepper(problem, inputs, tensor, tile.tensor, mode);
  const Place place((tile.col_end - tile.col_begin + Step::L - 1) / Step::L, tile.row_end - tile.row_begin, by_col);
  const TileWalk<Type, variant> walk{problem, tile, tensor, stepper, place, shared, by_row};
  if (by_col) {
    walk.template walk<true>();
  } else {
    walk.template walk<false>();
  }
}

// ---- what moves the laws --------------------------------------------------------------------------------------------

// A block for each parameter group, whose threads take a law each, with and without a first step.
__global__ void find_transitions(const __grid_constant__ Inputs inputs) {
  if (threadIdx.x >= 2 * n_laws) return;
  const Law law = Law(threadIdx.x % n_laws);
  const bool first = threadIdx.x / n_laws;
  const Hyper hyper = hyper_in(inputs, blockIdx.x);
  Transitions& found = inputs.transitions[2 * blockIdx.x + first];
  found.discrete[law] = discrete_transition(law, coefficients(hyper, first));
  found.flow[law] = flow_transition(law, hyper);
}

// ---- second stage: lines to segments, laws, clock -------------------------------------------------------------------

struct SpanShared {
  Transitions transitions;
  double sums[n_moments * n_finishers / 2];  // [moment, thread]
};

// A line of a segment: one of `inner` neighbours, which come again `repeats` times in each slice.
struct Line {
  unsigned slice, repeat, inner;

  // The n-th of them all, slice after slice.
  NPERF_D Line(unsigned n, unsigned inner_size, unsigned repeats)
      : slice(n / inner_size / repeats), repeat(n / inner_size % repeats), inner(n % inner_size) {}

  // As many further on as `step` is from the first.
  NPERF_D void advance(const Line& step, unsigned inner_size, unsigned repeats) {
    inner += step.inner;
    repeat += step.repeat;
    slice += step.slice;
    if (inner >= inner_size) {
      inner -= inner_size;
      ++repeat;
    }
    if (repeat >= repeats) {
      repeat -= repeats;
      ++slice;
    }
  }
};

// Adds the lines of segment `segment` that are this thread's among `splits`: several on their way, one after the other.
template <class Scalar>
NPERF_D void add_lines(const Problem& problem, const View& view, int64_t n_lines, int64_t segment, int split,
                       int splits, int n_acc, double (&sums)[n_moments]) {
  constexpr int at_once = 2;
  const int64_t period = view.inner * view.n_segments;
  const unsigned inner = unsigned(view.inner), repeats = unsigned(n_lines / period);
  const int64_t n_terms = view.n_slices * repeats * inner;
  if (n_terms == 0) return;
  const Scalar* const lines = lines_of<Scalar>(problem, view, n_lines, 0, 0) + segment * inner;
  const Line step(splits, inner, repeats);
  Line line(split, inner, repeats);
  for (int64_t term = split; term < n_terms; term += at_once * splits) {
    Scalar terms[at_once][n_moments];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const Scalar* const from = lines + line.slice * (n_moments * n_lines) + line.repeat * period + line.inner;
      const int n_there = term + k * splits < n_terms ? n_acc : 0;
#pragma unroll
      for (int m = 0; m < n_moments; ++m) terms[k][m] = m < n_there ? from[m * n_lines] : Scalar(0);
      line.advance(step, inner, repeats);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k)
#pragma unroll
      for (int m = 0; m < n_moments; ++m) sums[m] += double(terms[k][m]);
  }
}

// Counts the step and each group's time, unless it is skipped, and keeps which buffers are still to be written.
NPERF_D void finish_step(const Problem& problem, const Inputs& inputs, bool skipped) {
  if (threadIdx.x == 0 && !skipped) problem.clock[0] += 1.0;
  for (int64_t i = threadIdx.x; i < problem.n_hypers && !skipped; i += n_finishers)
    problem.clock[1 + i] += duration(hyper_in(inputs, i));
  for (int64_t i = threadIdx.x; i < problem.n_tensors; i += n_finishers) {
    const bool written = !skipped && takes_part(inputs, i) && inputs.hypers[problem.tensors[i].hyper].momentum != 0.0;
    problem.fresh[i] = !written && (problem.fresh[i] | inputs.first[i]);
  }
}

// What a step changes of one segment's law state; read before its moments are known, written after.
template <Law law>
NPERF_D void read_state(const Problem& problem, int64_t segment, double (&state)[n_state]) {
#pragma unroll
  for (int k = x_sum; k < n_rows(law); ++k) state[k] = problem.states[law][k * problem.states_stride[law] + segment];
}

template <Law law>
NPERF_D void write_state(const Problem& problem, int64_t segment, const double (&state)[n_state]) {
#pragma unroll
  for (int k = x_sum; k < n_rows(law); ++k) problem.states[law][k * problem.states_stride[law] + segment] = state[k];
}

// A block for each span of segments, and one for the step as a whole; eight of them on a multiprocessor, as registers
// go.
__global__ void __launch_bounds__(n_finishers, 8)
    finish_spans(const __grid_constant__ Problem problem, const __grid_constant__ Inputs inputs) {
  if (blockIdx.x == problem.n_spans) {
    if (!inputs.measuring) finish_step(problem, inputs, skips(inputs));
    return;
  }
  const Span span = problem.spans[blockIdx.x];
  const View& view = problem.views[span.view];
  const Tensor& tensor = problem.tensors[span.tensor];
  double* const moments = problem.moments + view.segment;
  const bool skipped = skips(inputs), part = takes_part(inputs, span.tensor);
  const int n_acc = n_accumulated(mode_in(inputs, tensor, span.tensor));
  if (skipped) return;
  if (!part) {  // its charges stay, the moments of gradient and update are zero
    for (int m = sum_g; m < n_moments; ++m)
      for (int64_t i = span.begin + threadIdx.x; i < span.end; i += n_finishers)
        moments[m * problem.moments_stride + i] = 0.0;
    return;
  }
  SHARED(shared, SpanShared);
  constexpr int n_words = sizeof(Transitions) / sizeof(double);
  if (threadIdx.x < n_words && !inputs.measuring) {
    // An empty tensor has no tile that could leave its flag.
    const uint8_t* const first = tensor.n_rows * tensor.n_cols > 0 ? problem.pending : inputs.first;
    const Transitions& found = inputs.transitions[2 * tensor.hyper + (first[span.tensor] != 0)];
    reinterpret_cast<double*>(&shared.transitions)[threadIdx.x] = reinterpret_cast<const double*>(&found)[threadIdx.x];
  }
  const int64_t n_lines = view.by_row ? tensor.n_rows : tensor.n_cols;
  const int64_t n_segments = span.end - span.begin;
  int width = 1;
  while (width < n_segments && width < n_finishers) width *= 2;
  const int splits = n_finishers / width;  // threads that share a segment
  // Neighbouring threads read neighbouring lines.
  const bool one_line = view.inner == 1;
  const int mine = one_line ? threadIdx.x % width : threadIdx.x / splits;
  const int split = one_line ? threadIdx.x / width : threadIdx.x % splits;
  for (int64_t i = span.begin + mine; i - mine < span.end; i += width) {
    const bool finishes = split == 0 && i < span.end;
    const bool advances = finishes && !inputs.measuring;
    double translated[n_state], normed[n_state];
    if (advances && view.translation >= 0) read_state<translation>(problem, view.translation + i, translated);
    if (advances && view.norm >= 0) read_state<norm>(problem, view.norm + i, normed);
    double sums[n_moments] = {};
    if (i < span.end) {
      if (tensor.dtype == float64) {
        add_lines<double>(problem, view, n_lines, i, split, splits, n_acc, sums);
      } else {
        add_lines<float>(problem, view, n_lines, i, split, splits, n_acc, sums);
      }
    }
    for (int half = splits / 2; half > 0; half /= 2) {
      __syncthreads();
      double* const place = shared.sums + mine * half;
      if (split >= half && split < 2 * half)
#pragma unroll
        for (int m = 0; m < n_moments; ++m) place[m * n_finishers / 2 + split - half] = sums[m];
      __syncthreads();
      if (split < half)
#pragma unroll
        for (int m = 0; m < n_moments; ++m) sums[m] += place[m * n_finishers / 2 + split];
    }
    __syncthreads();  // for the transitions, too
    if (!finishes) continue;
#pragma unroll
    for (int m = 0; m < n_moments; ++m) moments[m * problem.moments_stride + i] = sums[m];
    if (advances && view.translation >= 0) {
      advance_translation(translated, 1, sums, 1, shared.transitions, 0);
      write_state<translation>(problem, view.translation + i, translated);
    }
    if (advances && view.norm >= 0) {
      advance_norm(normed, 1, sums, 1, shared.transitions, 0);
      write_state<norm>(problem, view.norm + i, normed);
    }
  }
  if (threadIdx.x == 0 && !inputs.measuring && span.begin == 0 && span.view == tensor.view)
    propagate(problem.propagators + span.tensor * 8 * n_laws, shared.transitions);
}

#if defined(__CUDACC__)
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
#endif

template <class Type>
void launch_tiles(const Problem& problem, const Inputs& inputs, const Launch& launch, void* stream) {
  const auto start = [&](auto kernel) {
    LAUNCH(kernel, unsigned(launch.end - launch.begin), n_threads, stream, problem, inputs, launch.begin, launch.dtype);
  };
  switch (launch.variant) {
    case 0:
      return start(step_tiles<Type, 0>);
    case 1:
      return start(step_tiles<Type, 1>);
    case 2:
      return start(step_tiles<Type, 2>);
    default:
      return start(step_tiles<Type, any>);
  }
}

}  // namespace

void launch(const Problem& problem, const Inputs& inputs, const std::vector<Launch>& launches, void* stream) {
  for (const Launch& launch : launches) {
    switch (launch.dtype) {
      case float32:
        launch_tiles<Float32>(problem, inputs, launch, stream);
        break;
      case float64:
        launch_tiles<Float64>(problem, inputs, launch, stream);
        break;
      case bfloat16:
        launch_tiles<BFloat16>(problem, inputs, launch, stream);
        break;
      case float16:
        launch_tiles<Float16>(problem, inputs, launch, stream);
        break;
    }
  }
  LAUNCH(finish_spans, unsigned(problem.n_spans + 1), n_finishers, stream, problem, inputs);
#if defined(__CUDACC__)
  check(cudaGetLastError());
#endif
}

void find_transitions(int64_t n_hypers, const Inputs& inputs, void* stream) {
  LAUNCH(find_transitions, unsigned(n_hypers), 32, stream, inputs);
#if defined(__CUDACC__)
  check(cudaGetLastError());
#endif
}

int n_devices() {
#if defined(__CUDACC__)
  int n = 0;
  check(cudaGetDeviceCount(&n));
  return n;
#else
  return 0;
#endif
}

}  // namespace noetherperf
