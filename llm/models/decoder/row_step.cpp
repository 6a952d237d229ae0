// One decoding step of a few rows on a CPU: all layers and the head in one call; `row_step.py` builds and calls it.
//
// Such a step is as fast as memory gives the weights. So each one is read once, in the dtype in which the model holds it, by
// threads that share the outputs of every product and meet after each. Sums are in fp32, whatever the weights are. What a row
// gets depends neither on the number of threads nor on the rows beside it.
//
// Letters: R rows, D hidden size, H heads, K key and value heads, E head size, S cache slots.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int STEP = 2 * LANES;        // weights that are widened at a time
constexpr int64_t AHEAD = 1024;        // bytes between a weight and the one that memory is asked for, the best of 0 to 4,096
typedef float Quad __attribute__((vector_size(16)));
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct bf16 {
  uint16_t bits;
};

// outputs x inputs in memory, with a bias or null.
struct Matrix {
  const void* weight;
  const float* bias;
  int64_t outputs, inputs;
};

// What all layers have in common.
struct Shape {
  int64_t hidden, heads, kv_heads, size, rotated, inner, layers;
  int64_t is_gelu, norm_over_heads, neighbours;  // neighbours: channels 2i and 2i + 1 are rotated together
  float epsilon, score_scale, residual_scale, softcap;
};

struct Layer {
  const float* norms[4];  // null where there is none
  Matrix inputs[3];       // queries, keys, values
  const float* head_norms[2];
  Matrix output, gate_up[2], down;
  int64_t window, kind;  // 0 slots: all; the kind of its angles
};

// Keys and values, (layers, R, 2 K, S, E); strides in elements.
struct Cache {
  float* data;
  int64_t layer, row, head;
};

// A thread and its share of `count` things: whole groups of four.
struct Thread {
  int number, threads;
  int64_t first(int64_t count) const { return (count + 3) / 4 * number / threads * 4; }
  int64_t last(int64_t count) const { return std::min(count, (count + 3) / 4 * (number + 1) / threads * 4); }
};

inline void wait_for_all() {
#pragma omp barrier
}

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// STEP weights as two vectors: two halves of fp32, or those of bf16 at even and at odd places, which one load gives.
inline void widen(const float* from, Lanes* parts) {
  parts[0] = load(from);
  parts[1] = load(from + LANES);
}

inline void widen(const bf16* from, Lanes* parts) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  parts[0] = (Lanes)(words << 16);
  parts[1] = (Lanes)(words & 0xffff0000u);
}

inline float widened_one(const float* from) { return *from; }

inline float widened_one(const bf16* from) {
  const uint32_t word = uint32_t(from->bits) << 16;
  float number;
  std::memcpy(&number, &word, sizeof number);
  return number;
}

inline float sum_of(Lanes lanes) {
  Quad quads[LANES / 4];
  std::memcpy(quads, &lanes, sizeof quads);
  for (int i = 1; i < LANES / 4; i++) quads[0] += quads[i];
  return (quads[0][0] + quads[0][1]) + (quads[0][2] + quads[0][3]);
}

// x (R, inputs) in the order in which `widen` gives weights; what does not fill a step stays.
template <typename T>
const float* arranged(const float* x, int64_t rows, int64_t inputs, float* out) {
  if (sizeof(T) == sizeof(float)) return x;
  for (int64_t r = 0; r < rows; r++, x += inputs, out += inputs) {
    int64_t i = 0;
    for (; i + STEP <= inputs; i += STEP)
      for (int lane = 0; lane < LANES; lane++) {
        out[i + lane] = x[i + 2 * lane];
        out[i + LANES + lane] = x[i + 2 * lane + 1];
      }
    std::copy(x + i, x + inputs, out + i);
  }
  return out - rows * inputs;
}

// out (R, outputs) from `first` to `last`, of x (R, inputs) as `arranged`: output by output, as the weights lie in memory.
template <typename T, int R>
void multiply(const T* weight, int64_t inputs, int64_t outputs, int64_t first, int64_t last, const float* x, float* out) {
  weight += first * inputs;
  for (int64_t o = first; o < last; o++, weight += inputs) {
    Lanes sums[R][2] = {};
    int64_t i = 0;
    for (; i + STEP <= inputs; i += STEP) {
      Lanes parts[2];
      __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + AHEAD);
      widen(weight + i, parts);
      for (int r = 0; r < R; r++)
        for (int part = 0; part < 2; part++) sums[r][part] += parts[part] * load(x + r * inputs + i + part * LANES);
    }
    for (int r = 0; r < R; r++) {
      float sum = sum_of(sums[r][0] + sums[r][1]);
      for (int64_t rest = i; rest < inputs; rest++) sum += widened_one(weight + rest) * x[r * inputs + rest];
      out[r * outputs + o] = sum;
    }
  }
}

// out (R, outputs) of an arranged x (R, inputs): what falls to the thread.
template <typename T>
void product(const Matrix& matrix, Thread thread, int64_t rows, const float* x, float* out) {
  const int64_t first = thread.first(matrix.outputs), last = thread.last(matrix.outputs);
  const auto by_rows = rows == 1 ? multiply<T, 1> : rows == 2 ? multiply<T, 2> : rows == 3 ? multiply<T, 3> : multiply<T, 4>;
  by_rows(static_cast<const T*>(matrix.weight), matrix.inputs, matrix.outputs, first, last, x, out);
  for (int64_t r = 0; matrix.bias && r < rows; r++)
    for (int64_t o = first; o < last; o++) out[r * matrix.outputs + o] += matrix.bias[o];
}

float inverse_root_mean_square(const float* x, int64_t count, float epsilon) {
  float sum = 0;
  for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / count + epsilon);
}

// RMSNorm of x (R, D); x itself without a weight.
const float* normal(const float* x, const float* weight, int64_t rows, int64_t hidden, float epsilon, float* out) {
  if (!weight) return x;
  for (int64_t r = 0; r < rows; r++, x += hidden) {
    const float scale = inverse_root_mean_square(x, hidden, epsilon);
    for (int64_t i = 0; i < hidden; i++) out[r * hidden + i] = x[i] * scale * weight[i];
  }
  return out;
}

float activated(float gate, bool is_gelu) {
  if (!is_gelu) return gate / (1 + std::exp(-gate));
  return gate / 2 * (1 + std::tanh(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));  // sqrt(2 / pi)
}

// One head of all (heads, E), normalized if there is a weight, and rotated; the halves of `out` are the coordinates of pairs.
void rotate(const Shape& shape, const float* all, int64_t heads, int64_t head, const float* weight, const float* cosine,
            const float* sine, float* out, float* scratch) {
  const int64_t size = shape.size, half = shape.rotated / 2;
  const float* x = all + head * size;
  if (weight) {
    const bool over = shape.norm_over_heads;
    const float scale = inverse_root_mean_square(over ? all : x, over ? heads * size : size, shape.epsilon);
    for (int64_t e = 0; e < size; e++) scratch[e] = x[e] * scale * weight[(over ? head * size : 0) + e];
    x = scratch;
  }
  const int64_t step = shape.neighbours ? 2 : 1, second = shape.neighbours ? 1 : half;
  for (int64_t e = 0; e < half; e++) {
    const float left = x[e * step], right = x[e * step + second];
    out[e] = left * cosine[e] + right * sine[e];
    out[e + half] = right * cosine[e + half] + left * sine[e + half];
  }
  std::copy(x + 2 * half, x + size, out + 2 * half);
}

// Attention of one query over `count` keys and values, (count, E) each.
void attend(const Shape& shape, const float* q, const float* keys, const float* values, int64_t count, float* scores, float* out) {
  const int64_t size = shape.size;
  multiply<float, 1>(keys, size, count, 0, count, q, scores);
  float most = -INFINITY, sum = 0;
  for (int64_t s = 0; s < count; s++) {
    scores[s] *= shape.score_scale;
    if (shape.softcap) scores[s] = shape.softcap * std::tanh(scores[s] / shape.softcap);
    most = std::max(most, scores[s]);
  }
  std::fill(out, out + size, 0.0f);
  for (int64_t s = 0; s < count; s++) {
    const float weight = std::exp(scores[s] - most);
    sum += weight;
    for (int64_t e = 0; e < size; e++) out[e] += weight * values[s * size + e];
  }
  for (int64_t e = 0; e < size; e++) out[e] /= sum;
}

struct Step {
  const Shape& shape;
  const Layer* layers;
  Cache cache;
  const float* const* angles;  // (S, E) for each kind: cosine and signed sine of queries, of keys
  const int64_t* positions;    // (R,)
  int64_t rows;
  const float *embedded, *final_norm;  // (R, D), (D,)
  const Matrix& head;
  float *logits, *shared, *own;  // (R, V); what threads share; what each has alone
  int64_t own_size;

  // Floats that threads share, and that each has alone, where no row has more than `longest` positions.
  static int64_t shared_floats(const Shape& s, int64_t rows) {
    return rows * ((2 * s.heads + 2 * s.kv_heads) * s.size + 2 * s.inner + 2 * s.hidden);
  }
  static int64_t own_floats(const Shape& s, int64_t rows, int64_t longest) {
    return rows * (2 * s.hidden + widest(s)) + 2 * s.size + longest;
  }

  static int64_t widest(const Shape& s) { return std::max({s.hidden, s.inner, s.heads * s.size}); }

  template <typename T>
  void run(Thread thread) const {
    const int64_t hidden = shape.hidden, size = shape.size, heads = shape.heads, kv_heads = shape.kv_heads;
    float *q = shared, *k = q + rows * heads * size, *v = k + rows * kv_heads * size, *mixed = v + rows * kv_heads * size;
    float *gate = mixed + rows * heads * size, *up = gate + rows * shape.inner, *out = up + rows * shape.inner;
    float *inner = out + rows * hidden, *x = own + thread.number * own_size, *narrow = x + rows * hidden;
    float *ready = narrow + rows * hidden, *scratch = ready + rows * widest(shape);
    const auto ordered = [&](const float* from, int64_t inputs) { return arranged<T>(from, rows, inputs, ready); };
    const auto normed = [&](const float* weight) {
      return ordered(normal(x, weight, rows, hidden, shape.epsilon, narrow), hidden);
    };
    std::copy(embedded, embedded + rows * hidden, x);
    for (const Layer* layer = layers; layer < layers + shape.layers; layer++) {
      const float* read = normed(layer->norms[0]);
      product<T>(layer->inputs[0], thread, rows, read, q);
      product<T>(layer->inputs[1], thread, rows, read, k);
      product<T>(layer->inputs[2], thread, rows, read, v);
      wait_for_all();
      store(*layer, thread, k, v, scratch);
      wait_for_all();
      mix(*layer, thread, q, mixed, scratch);
      wait_for_all();
      product<T>(layer->output, thread, rows, ordered(mixed, heads * size), out);
      wait_for_all();
      add(x, out, layer->norms[1], narrow);
      read = normed(layer->norms[2]);
      product<T>(layer->gate_up[0], thread, rows, read, gate);
      product<T>(layer->gate_up[1], thread, rows, read, up);
      for (int64_t r = 0; r < rows; r++)  // of its own share, for which no other thread waits
        for (int64_t i = thread.first(shape.inner); i < thread.last(shape.inner); i++)
          gate[r * shape.inner + i] = activated(gate[r * shape.inner + i], shape.is_gelu) * up[r * shape.inner + i];
      wait_for_all();
      product<T>(layer->down, thread, rows, ordered(gate, shape.inner), inner);
      wait_for_all();
      add(x, inner, layer->norms[3], narrow);
    }
    product<T>(head, thread, rows, normed(final_norm), logits);
  }

  float* slots(const Layer& layer, int64_t row, int64_t head) const {
    return cache.data + (&layer - layers) * cache.layer + row * cache.row + head * cache.head;
  }

  // New keys and values go to the cache.
  void store(const Layer& layer, Thread thread, const float* k, const float* v, float* scratch) const {
    const int64_t size = shape.size, heads = shape.kv_heads;
    for (int64_t pair = thread.number; pair < rows * heads; pair += thread.threads) {
      const int64_t row = pair / heads, head = pair % heads, place = positions[row] * size;
      rotate(shape, k + row * heads * size, heads, head, layer.head_norms[1], angles[4 * layer.kind + 2] + place,
             angles[4 * layer.kind + 3] + place, slots(layer, row, head) + place, scratch);
      std::copy_n(v + pair * size, size, slots(layer, row, heads + head) + place);
    }
  }

  // What the heads mix of the values, (R, H, E).
  void mix(const Layer& layer, Thread thread, const float* q, float* mixed, float* scratch) const {
    const int64_t size = shape.size, heads = shape.heads, group = heads / shape.kv_heads;
    for (int64_t pair = thread.number; pair < rows * heads; pair += thread.threads) {
      const int64_t row = pair / heads, head = pair % heads, place = positions[row] * size, seen = positions[row] + 1;
      const int64_t first = layer.window ? std::max<int64_t>(0, seen - layer.window) : 0;
      rotate(shape, q + row * heads * size, heads, head, layer.head_norms[0], angles[4 * layer.kind] + place,
             angles[4 * layer.kind + 1] + place, scratch, scratch + size);
      attend(shape, scratch, slots(layer, row, head / group) + first * size,
             slots(layer, row, shape.kv_heads + head / group) + first * size, seen - first, scratch + 2 * size, mixed + pair * size);
    }
  }

  // x += a branch, which may have a norm of its own.
  void add(float* x, const float* branch, const float* norm, float* narrow) const {
    branch = normal(branch, norm, rows, shape.hidden, shape.epsilon, narrow);
    for (int64_t i = 0; i < rows * shape.hidden; i++) x[i] += branch[i] * shape.residual_scale;
  }
};

}  // namespace

// Logits (R, V) of at most four rows. Returns 1 where there is no memory.
extern "C" int row_step(const Shape* shape, const Layer* layers, const Cache* cache, const float* const* angles,
                        const int64_t* positions, int64_t rows, const float* embedded, const float* final_norm,
                        const Matrix* head, float* logits, int is_bf16, int threads) {
  const int64_t longest = *std::max_element(positions, positions + rows) + 1;
  const int64_t own_size = (Step::own_floats(*shape, rows, longest) + 31) / 16 * 16;  // threads share no line of the cache
  const int64_t shared_size = Step::shared_floats(*shape, rows);
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[shared_size + threads * own_size]);
  if (!memory) return 1;
  const Step step{*shape, layers, *cache, angles, positions, rows, embedded, final_norm, *head, logits, memory.get(),
                  memory.get() + shared_size, own_size};
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const Thread thread{omp_get_thread_num(), omp_get_num_threads()};
#else
    const Thread thread{0, 1};
#endif
    is_bf16 ? step.run<bf16>(thread) : step.run<float>(thread);
  }
  return 0;
}
