// Causal attention inside documents on CPUs with AVX512-BF16, forward and backward; `fused_attention.py` builds and calls it.
//
// A thread takes the heads that share keys, and of them eight queries at a time: their scores stay in its first cache, and
// only keys that some of the eight can see are multiplied, in panels of 32. Products are made by one tile of 8 x 32 sums that
// stay in registers; `vdpbf16ps` adds products of two pairs, so one operand of each product is packed into panels of pairs.
//
// Letters: B rows, T positions, H query heads, K key and value heads, E head size. T and E are multiples of 32.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

using bf16 = uint16_t;

constexpr int64_t ROWS = 8;      // of a tile: its 16 sums in registers hide how long a product takes
constexpr int64_t COLUMNS = 32;  // of a tile, and of a panel
constexpr int64_t BLOCK = 64;    // queries whose share of the gradients of keys and values is added at once

constexpr float LOG2_E = 1.44269504f;

struct Shape {
  int64_t rows, heads, kv_heads, length, size;
};

// (B, H or K, T, E) in memory, where the size comes last; strides are in elements.
struct Heads {
  bf16* data;
  int64_t row, head, position;
  bf16* of(int64_t b, int64_t h) const { return data + b * row + h * head; }
};

template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(_mm_malloc(count * sizeof(T), 64))) {}
  ~Buffer() { _mm_free(data); }
  Buffer(const Buffer&) = delete;
  operator T*() const { return data; }  // null where there is no memory
};

inline __m512i load(const bf16* from) { return _mm512_loadu_si512(from); }

inline __m512 widened(const bf16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// sums (8 x 32, stride `stride`) = a (8 x pairs x 2, stride `step`) * panel (pairs x 32 x 2), or += where ADD.
template <bool ADD>
inline void multiply(int64_t pairs, const bf16* a, int64_t step, const bf16* panel, float* sums, int64_t stride) {
  __m512 sum[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
    for (int half = 0; half < 2; half++)
      sum[r][half] = ADD ? _mm512_loadu_ps(sums + r * stride + 16 * half) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; p++) {
    const __m512bh left = (__m512bh)load(panel + p * 64), right = (__m512bh)load(panel + p * 64 + 32);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t pair;
      std::memcpy(&pair, a + r * step + 2 * p, sizeof pair);
      const __m512bh repeated = (__m512bh)_mm512_set1_epi32(pair);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, repeated);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, repeated);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
    for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + r * stride + 16 * half, sum[r][half]);
}

// 16 x 16 values of 32 bits.
inline void transpose_square(__m512i (&row)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Values of 32 bits: `from` (rows x columns, stride `step`) to `to` (columns x rows, stride `stride`), multiples of 16.
inline void transpose(const void* from, int64_t step, void* to, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      __m512i square[16];
      for (int r = 0; r < 16; r++) square[r] = _mm512_loadu_si512(static_cast<const int32_t*>(from) + (i + r) * step + j);
      transpose_square(square);
      for (int r = 0; r < 16; r++) _mm512_storeu_si512(static_cast<int32_t*>(to) + (j + r) * stride + i, square[r]);
    }
}

// Two rows of 32 become 32 pairs.
inline void store_pairs(__m512i first, __m512i second, bf16* to) {
  alignas(64) static constexpr bf16 ORDER[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(ORDER), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(first, high, second));
}

// Panels of 32 positions, with pairs along the size: (T / 32, E / 2, 32, 2). For products with the transposed matrix.
void pack_transposed(const bf16* from, int64_t step, const Shape& shape, bf16* panels) {
  for (int64_t t = 0; t < shape.length; t += COLUMNS)
    transpose(from + t * step, step / 2, panels + t * shape.size, COLUMNS, COLUMNS, shape.size / 2);
}

// Panels of 32 of the size, with pairs along positions: (E / 32, T / 2, 32, 2). For products with the matrix as it is.
void pack(const bf16* from, int64_t step, const Shape& shape, bf16* panels) {
  for (int64_t e = 0; e < shape.size; e += COLUMNS)
    for (int64_t t = 0; t < shape.length; t += 2)
      store_pairs(load(from + t * step + e), load(from + (t + 1) * step + e), panels + e * shape.length + t * COLUMNS);
}

// `rows` of the size, transposed: (E, BLOCK), so that pairs are along rows.
void transpose_rows(const bf16* from, int64_t step, int64_t rows, int64_t size, bf16* pairs, bf16* to) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t e = 0; e < size; e += COLUMNS)
      store_pairs(load(from + r * step + e), load(from + (r + 1) * step + e), pairs + r * size + 2 * e);
  transpose(pairs, size, to, BLOCK / 2, rows / 2, size);
}

// 2^x for x <= 0: Taylor's polynomial within half a power, off by 4e-6 of it at most.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0), part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(0.00133336f);
  for (const float factor : {0.00961813f, 0.05550411f, 0.24022651f, 0.69314718f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

// Which of 16 keys from `at` on are from `first` to `last`.
inline __mmask16 seen(int64_t at, int64_t first, int64_t last) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i key = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(at)), count);
  return _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(static_cast<int>(first))) &
         _mm512_cmple_epi32_mask(key, _mm512_set1_epi32(static_cast<int>(last)));
}

inline int64_t down(int64_t position) { return position / COLUMNS * COLUMNS; }
inline int64_t up(int64_t position) { return down(position + COLUMNS - 1); }

// Weights of a head lie block after block, each as wide as the keys up to its end: where those of the block at `start` begin.
inline int64_t weights_before(int64_t start) {
  const int64_t blocks = start / BLOCK;
  return BLOCK * BLOCK * blocks * (blocks + 1) / 2;
}

// Rows of sums (8 x E), each times its factor, to where they belong.
inline void store_rows(const float* sums, const float* factors, int64_t size, bf16* to, int64_t step) {
  for (int r = 0; r < ROWS; r++)
    for (int64_t e = 0; e < size; e += COLUMNS) {
      const __m512 factor = _mm512_set1_ps(factors ? factors[r] : 1.0f);
      const float* sum = sums + r * size + e;
      const __m512i both =
          rounded(_mm512_mul_ps(_mm512_loadu_ps(sum), factor), _mm512_mul_ps(_mm512_loadu_ps(sum + 16), factor));
      _mm512_storeu_si512(to + r * step + e, both);
    }
}

// exp(scale * score - the row's largest) of eight queries from t on, into `weights` (8 x width), and one over their sums.
void softmax(const float* scores, int64_t length, int64_t t, const int32_t* starts, int64_t low, int64_t high, float scale,
             bf16* weights, int64_t width, float* inverse) {
  const __m512 factor = _mm512_set1_ps(scale * LOG2_E);
  for (int r = 0; r < ROWS; r++) {
    const float* score = scores + r * length;
    const int64_t first = starts[t + r], last = t + r;
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = low; j < high; j += 16)
      largest = _mm512_mask_max_ps(largest, seen(j, first, last), largest, _mm512_loadu_ps(score + j));
    const __m512 offset = _mm512_mul_ps(_mm512_set1_ps(-_mm512_reduce_max_ps(largest)), factor);
    for (int64_t j = low; j < high; j += COLUMNS) {
      __m512 weight[2];
      for (int half = 0; half < 2; half++) {
        const int64_t key = j + 16 * half;
        weight[half] = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(score + key), factor, offset));
        weight[half] = _mm512_maskz_mov_ps(seen(key, first, last), weight[half]);
        sum = _mm512_add_ps(sum, weight[half]);
      }
      _mm512_storeu_si512(weights + r * width + j, rounded(weight[0], weight[1]));
    }
    inverse[r] = 1.0f / _mm512_reduce_add_ps(sum);
  }
}

}  // namespace

extern "C" {

// How many weights are kept of a head.
int64_t weights_per_head(int64_t length) { return weights_before((length + BLOCK - 1) / BLOCK * BLOCK); }

// `starts` has, `start_step` apart for each row, the first position of each one's document. `weights` and `inverse`,
// (B, H, ...) and (B, H, T), are for the backward pass: weights before they are divided by their sum, and one over it. Returns
// whether memory was missing.
int forward(const Shape* given, const Heads* q, const Heads* k, const Heads* v, const Heads* out, bf16* weights,
            float* inverse, const int32_t* starts, int64_t start_step, int threads) {
  const Shape shape = *given;
  const int64_t length = shape.length, size = shape.size, group = shape.heads / shape.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  int missing = 0;
#pragma omp parallel num_threads(threads)
  {
    const Buffer<bf16> keys(length * size), values(length * size);
    const Buffer<float> scores(ROWS * length), sums(ROWS * size);
    if (!keys || !values || !scores || !sums) {
#pragma omp atomic write
      missing = 1;
    }
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < (missing ? 0 : shape.rows * shape.kv_heads); task++) {
      const int64_t b = task / shape.kv_heads, shared = task % shape.kv_heads;
      const int32_t* start = starts + b * start_step;
      pack_transposed(k->of(b, shared), k->position, shape, keys);
      pack(v->of(b, shared), v->position, shape, values);
      for (int64_t h = shared * group; h < (shared + 1) * group; h++) {
        const int64_t number = b * shape.heads + h;
        for (int64_t t = 0; t < length; t += ROWS) {
          const int64_t block = t / BLOCK * BLOCK, width = block + BLOCK, low = down(start[t]), high = up(t + ROWS);
          bf16* weight = weights + number * weights_per_head(length) + weights_before(block) + (t - block) * width;
          float* over = inverse + number * length + t;
          const bf16* query = q->of(b, h) + t * q->position;
          for (int64_t j = low; j < high; j += COLUMNS)
            multiply<false>(size / 2, query, q->position, keys + j * size, scores + j, length);
          softmax(scores, length, t, start, low, high, scale, weight, width, over);
          for (int64_t e = 0; e < size; e += COLUMNS)
            multiply<false>((high - low) / 2, weight + low, width, values + e * length + low * COLUMNS, sums + e, size);
          store_rows(sums, over, size, out->of(b, h) + t * out->position, out->position);
        }
      }
    }
  }
  return missing;
}

// The gradients dq, dk and dv of what `forward` computed, from that of its result. Returns whether memory was missing.
int backward(const Shape* given, const Heads* q, const Heads* k, const Heads* v, const Heads* out, const bf16* weights,
             const float* inverse, const int32_t* starts, int64_t start_step, int threads, const Heads* grad, const Heads* dq,
             const Heads* dk, const Heads* dv) {
  const Shape shape = *given;
  const int64_t length = shape.length, size = shape.size, group = shape.heads / shape.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  int missing = 0;
#pragma omp parallel num_threads(threads)
  {
    const Buffer<bf16> keys(length * size), values(length * size);
    // Of a block: scores' gradients by rows, and these and weights as panels, (T / 32, BLOCK / 2, 32, 2).
    const Buffer<bf16> dscores(BLOCK * (length + BLOCK)), dscore_panels(BLOCK * length), weight_panels(BLOCK * length);
    // Gradients of its results, over the sums of weights; and as factors, (E, BLOCK), these and its queries.
    const Buffer<bf16> divided(BLOCK * size), grads(BLOCK * size), queries(BLOCK * size), pairs(BLOCK * size);
    const Buffer<float> dweights(ROWS * length), sums(ROWS * size), panel(COLUMNS * size);
    const Buffer<float> dkeys(length * size), dvalues(length * size);  // panels, transposed: (T / 32, E, 32)
    if (!keys || !values || !dscores || !dscore_panels || !weight_panels || !divided || !pairs || !queries || !grads ||
        !dweights || !sums || !panel || !dkeys || !dvalues) {
#pragma omp atomic write
      missing = 1;
    }
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < (missing ? 0 : shape.rows * shape.kv_heads); task++) {
      const int64_t b = task / shape.kv_heads, shared = task % shape.kv_heads;
      const int32_t* start = starts + b * start_step;
      pack(k->of(b, shared), k->position, shape, keys);
      pack_transposed(v->of(b, shared), v->position, shape, values);
      std::memset(dkeys, 0, length * size * sizeof(float));
      std::memset(dvalues, 0, length * size * sizeof(float));
      for (int64_t h = shared * group; h < (shared + 1) * group; h++) {
        const int64_t number = b * shape.heads + h;
        for (int64_t block = 0; block < length; block += BLOCK) {
          const int64_t stop = block + BLOCK < length ? block + BLOCK : length, width = block + BLOCK;
          const int64_t lowest = down(start[block]), highest = up(stop);
          for (int64_t t = block; t < stop; t += ROWS) {
            const int64_t low = down(start[t]), high = up(t + ROWS);
            const bf16* weight = weights + number * weights_per_head(length) + weights_before(block) + (t - block) * width;
            const bf16* wanted = grad->of(b, h) + t * grad->position;
            const bf16* result = out->of(b, h) + t * out->position;
            bf16* dscore = dscores + (t - block) * width;
            for (int64_t j = low; j < high; j += COLUMNS)
              multiply<false>(size / 2, wanted, grad->position, values + j * size, dweights + j, length);
            for (int r = 0; r < ROWS; r += 2) {  // a pair of rows
              __m512 mean[2], factor[2];
              for (int i = 0; i < 2; i++) {
                const float over = inverse[number * length + t + r + i];
                const __m512 by = _mm512_set1_ps(over);
                __m512 sum = _mm512_setzero_ps();
                for (int64_t e = 0; e < size; e += COLUMNS) {
                  const bf16 *g = wanted + (r + i) * grad->position + e, *o = result + (r + i) * out->position + e;
                  const __m512 first = widened(g), second = widened(g + 16);
                  sum = _mm512_fmadd_ps(first, widened(o), _mm512_fmadd_ps(second, widened(o + 16), sum));
                  _mm512_storeu_si512(divided + (t - block + r + i) * size + e,
                                      rounded(_mm512_mul_ps(first, by), _mm512_mul_ps(second, by)));
                }
                mean[i] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
                factor[i] = _mm512_set1_ps(over * scale);
              }
              for (int64_t j = lowest; j < highest; j += COLUMNS) {
                __m512i w[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, d[2] = {w[0], w[1]};
                for (int i = 0; i < 2 && low <= j && j < high; i++) {
                  const bf16* from = weight + (r + i) * width + j;
                  const float* dweight = dweights + (r + i) * length + j;
                  const __m512 first = _mm512_sub_ps(_mm512_loadu_ps(dweight), mean[i]);
                  const __m512 second = _mm512_sub_ps(_mm512_loadu_ps(dweight + 16), mean[i]);
                  w[i] = load(from);
                  d[i] = rounded(_mm512_mul_ps(first, _mm512_mul_ps(widened(from), factor[i])),
                                 _mm512_mul_ps(second, _mm512_mul_ps(widened(from + 16), factor[i])));
                  _mm512_storeu_si512(dscore + (r + i) * width + j, d[i]);
                }
                const int64_t place = j * BLOCK + (t - block + r) * COLUMNS;
                store_pairs(w[0], w[1], weight_panels + place);
                store_pairs(d[0], d[1], dscore_panels + place);
              }
            }
            for (int64_t e = 0; e < size; e += COLUMNS)
              multiply<false>((high - low) / 2, dscore + low, width, keys + e * length + low * COLUMNS, sums + e, size);
            store_rows(sums, nullptr, size, dq->of(b, h) + t * dq->position, dq->position);
          }
          transpose_rows(q->of(b, h) + block * q->position, q->position, stop - block, size, pairs, queries);
          transpose_rows(divided, size, stop - block, size, pairs, grads);
          for (int64_t j = lowest; j < highest; j += COLUMNS) {
            const int64_t before = j > block ? j - block : 0;  // queries of the block that come before these keys
            const int64_t count = (stop - block - before) / 2, place = j * BLOCK + before * COLUMNS;
            for (int64_t e = 0; e < size; e += ROWS) {
              const int64_t from = e * BLOCK + before, to = j * size + e * COLUMNS;
              multiply<true>(count, grads + from, BLOCK, weight_panels + place, dvalues + to, COLUMNS);
              multiply<true>(count, queries + from, BLOCK, dscore_panels + place, dkeys + to, COLUMNS);
            }
          }
        }
      }
      for (int64_t j = 0; j < length; j += COLUMNS) {
        transpose(dkeys + j * size, COLUMNS, panel, size, size, COLUMNS);
        for (int64_t r = 0; r < COLUMNS; r += ROWS)
          store_rows(panel + r * size, nullptr, size, dk->of(b, shared) + (j + r) * dk->position, dk->position);
        transpose(dvalues + j * size, COLUMNS, panel, size, size, COLUMNS);
        for (int64_t r = 0; r < COLUMNS; r += ROWS)
          store_rows(panel + r * size, nullptr, size, dv->of(b, shared) + (j + r) * dv->position, dv->position);
      }
    }
  }
  return missing;
}
}
