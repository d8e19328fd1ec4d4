// CPU kernels: attention, and what PyTorch does in several passes over memory. kernels/cpu.py
// compiles and calls them.
//
// Each kernel supports fp32 and bf16, computes in fp32 and rounds once. Inner loops are plain, so
// that the compiler vectorises them. Matmuls of small blocks are oneDNN's, called through PyTorch's
// library, with the instructions that the processor has: AMX, bf16 pairs, fp32.
// Work is divided by the number of threads alone, and partial sums are added in the threads' order,
// so results are the same bits every time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#include <vector>

namespace c10 {
struct BFloat16;
}

namespace at::native::cpublas {
// C [M, N] (+)= A [M, K] · B [K, N]; B in bf16 has its rows in pairs, [K / 2, N, 2].
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const c10::BFloat16 *A,
            const c10::BFloat16 *B, float *C, bool pairs);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const float *A,
            const float *B, float *C, bool pairs);
void brgemm_release(bool pairs);
} // namespace at::native::cpublas

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(float x) { return x; }

inline float get(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

inline void put(float &to, float x) { to = x; }

inline void put(bf16 &to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // ties to even
    to.bits = uint16_t(x == x ? nearest : 0x7fc0);
}

// e^x with a relative error of 2e-7; 0 below -87, infinite above 88. A Taylor series on half of
// [-ln 2, ln 2], whose remainder is 5e-9.
inline float exponential(float x) {
    float y = x < -87.0f ? -87.0f : x;
    y = y > 88.0f ? 88.0f : y;
    float n = std::nearbyint(y * 1.44269504f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    float inside = x > 88.0f ? std::numeric_limits<float>::infinity() : sum * power;
    return x < -87.0f ? 0.0f : inside;
}

// tanh x with a relative error of 2e-7: an odd polynomial near 0 (Cephes), e^2x elsewhere.
inline float hyperbolic_tangent(float x) {
    float square = x * x, size = std::fabs(x);
    float sum = -5.70498872745e-3f;
    sum = sum * square + 2.06390887954e-2f;
    sum = sum * square - 5.37397155531e-2f;
    sum = sum * square + 1.33314422036e-1f;
    sum = sum * square - 3.33332819422e-1f;
    float near = sum * square * x + x;
    float far = std::copysign(1 - 2 / (exponential(2 * size) + 1), x);
    return size < 0.625f ? near : far;
}

struct Range {
    int64_t begin, end;
};

// This thread's share of 0..count.
Range thread_range(int64_t count) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
}

constexpr int64_t SMALL = 8192; // as few numbers are computed by one thread

// ---- RMSNorm: x / √(mean x² + ε) · weight, of rows [T, E]

template <class T>
void rms_norm(T *out, float *inverse, const T *x, const T *weight, int64_t rows, int64_t width,
              double epsilon) {
#pragma omp parallel for if (rows * width > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        const T *row = x + t * width;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t e = 0; e < width; e++) square += get(row[e]) * get(row[e]);
        float scale = 1 / std::sqrt(square / float(width) + float(epsilon));
        inverse[t] = scale;
#pragma omp simd
        for (int64_t e = 0; e < width; e++)
            put(out[t * width + e], get(row[e]) * scale * get(weight[e]));
    }
}

template <class T>
void rms_norm_backward(T *grad_x, T *grad_weight, const T *grad, const T *x, const T *weight,
                       const float *inverse,
                   int64_t rows, int64_t width) {
    std::vector<double> sums;
#pragma omp parallel if (rows * width > SMALL)
    {
#pragma omp single
        sums.resize(omp_get_num_threads() * width);
        double *sum = sums.data() + omp_get_thread_num() * width;
        Range range = thread_range(rows);
        for (int64_t t = range.begin; t < range.end; t++) {
            const T *row = x + t * width, *slope = grad + t * width;
            float scale = inverse[t], along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t e = 0; e < width; e++) {
                float part = get(slope[e]) * get(row[e]) * scale;
                sum[e] += part;
                along += part * get(weight[e]);
            }
            // The component along x only changes the norm of x, which is divided out.
            float share = along / float(width) * scale;
#pragma omp simd
            for (int64_t e = 0; e < width; e++)
                put(grad_x[t * width + e],
                    (get(slope[e]) * get(weight[e]) - get(row[e]) * share) * scale);
        }
    }
    for (size_t at = width; at < sums.size(); at++) sums[at % width] += sums[at];
    for (int64_t e = 0; e < width; e++) put(grad_weight[e], float(sums[e]));
}

// ---- Rotary positions: pairs (i, i + D'/2) of each head of x [T, H, D], rotated by the angles
// [T, D'] of its token; the dimensions behind D' are kept

template <class T>
void rotate(T *out, const T *x, const float *cos, const float *sin, int64_t rows, int64_t heads,
            int64_t width, int64_t rotated, double direction) {
    int64_t half = rotated / 2;
    float sign = float(direction);
#pragma omp parallel for if (rows * heads * width > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        // The first half of the sines is negated.
        const float *c = cos + t * rotated, *s = sin + t * rotated + half;
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + (t * heads + h) * width;
            T *to = out + (t * heads + h) * width;
#pragma omp simd
            for (int64_t d = 0; d < half; d++) {
                float first = get(from[d]), second = get(from[d + half]), turn = s[d] * sign;
                put(to[d], first * c[d] - second * turn);
                put(to[d + half], second * c[d] + first * turn);
            }
            std::copy(from + rotated, from + width, to + rotated);
        }
    }
}

// ---- SwiGLU: gate · σ(gate) · up

template <class T> void swiglu(T *out, const T *gate, const T *up, int64_t count) {
#pragma omp parallel for simd if (count > SMALL)
    for (int64_t i = 0; i < count; i++) {
        float g = get(gate[i]);
        put(out[i], g / (1 + exponential(-g)) * get(up[i]));
    }
}

template <class T>
void swiglu_backward(T *grad_gate, T *grad_up, const T *grad, const T *gate, const T *up,
                     int64_t count) {
#pragma omp parallel for simd if (count > SMALL)
    for (int64_t i = 0; i < count; i++) {
        float g = get(gate[i]), slope = get(grad[i]), sigmoid = 1 / (1 + exponential(-g)),
            silu = g * sigmoid;
        put(grad_up[i], slope * silu);
        put(grad_gate[i], slope * get(up[i]) * (sigmoid + silu * (1 - sigmoid)));
    }
}

// ---- Softmax cross entropy of rows [T, V]

template <class T>
void cross_entropy(T *logits, const int64_t *labels, float *log_sums, float *chosen, int64_t rows,
                   int64_t vocabulary,
                   int64_t ignore_index, int64_t known, int64_t gradient, double z_loss) {
#pragma omp parallel for if (rows * vocabulary > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        T *row = logits + t * vocabulary;
        int64_t label = labels[t];
        if (!known) {
            float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
            for (int64_t v = 0; v < vocabulary; v++) top = std::max(top, get(row[v]));
            double sum = 0; // of fp32 sums of 512: an fp32 sum of 100,000 terms is inexact
            for (int64_t begin = 0; begin < vocabulary; begin += 512) {
                float part = 0;
                int64_t end = std::min(begin + 512, vocabulary);
#pragma omp simd reduction(+ : part)
                for (int64_t v = begin; v < end; v++) part += exponential(get(row[v]) - top);
                sum += part;
            }
            log_sums[t] = float(top + std::log(sum));
            chosen[t] = label >= 0 ? get(row[label]) : 0;
        }
        if (!gradient) continue;
        if (label == ignore_index) {
            std::memset(static_cast<void *>(row), 0, vocabulary * sizeof(T));
            continue;
        }
        float log_sum = log_sums[t];
        float factor = z_loss != 0 ? float(1 + 2 * z_loss * log_sum) : 1.0f;
        float own = label >= 0 ? exponential(get(row[label]) - log_sum) * factor - 1 : 0;
#pragma omp simd
        for (int64_t v = 0; v < vocabulary; v++)
            put(row[v], exponential(get(row[v]) - log_sum) * factor);
        if (label >= 0) put(row[label], own);
    }
}

// ---- Causal attention within documents
//
// Scores are computed in blocks of 64 queries by 64 keys, and stored as [keys, queries]: a query's
// maximum and sum are then vector operations, and the weights have the layout that the next matmul
// takes. Nothing of size length² is kept: the backward pass recomputes the weights from log Σ exp of
// each query (Dao et al. 2022).
//
// With a window, a query sees itself and the window - 1 tokens before it. Blocks of keys that no
// query of a block sees are left out. Other blocks are masked, the diagonal block comes first: each
// query then has a finite maximum from the start.
//
// A unit is a document under one key head. Its tasks are the query heads of that key head, block by
// block. Threads get ranges of tasks with equal work.

constexpr int64_t BLOCK = 64;

template <class T> constexpr int64_t PAIR = sizeof(T) == 2 ? 2 : 1;

inline void matmul(int64_t M, int64_t N, int64_t K, const float *a, const float *b, float *c,
                   bool add) {
    at::native::cpublas::brgemm(M, N, K, K, N, N, add, a, b, c, false);
}

inline void matmul(int64_t M, int64_t N, int64_t K, const bf16 *a, const bf16 *b, float *c,
                   bool add) {
    at::native::cpublas::brgemm(M, N, K, K, N, N, add, reinterpret_cast<const c10::BFloat16 *>(a),
                                reinterpret_cast<const c10::BFloat16 *>(b), c, true);
}

// Copy up to 64 rows that are `stride` apart; the rows below are zero.
template <class T> void load_block(T *to, const T *from, int64_t rows, int64_t stride,
                                   int64_t width) {
    for (int64_t i = 0; i < rows; i++)
        std::memcpy(to + i * width, from + i * stride, width * sizeof(T));
    std::memset(static_cast<void *>(to + rows * width), 0, (BLOCK - rows) * width * sizeof(T));
}

// Transpose a block: [64, D] → [D, 64].
template <class T> void transpose(T *to, const T *block, int64_t width) {
    for (int64_t d = 0; d < width; d++)
        for (int64_t i = 0; i < BLOCK; i++) to[d * BLOCK + i] = block[i * width + d];
}

// Interleave pairs of rows: [K, N] → [K / PAIR, N, PAIR].
template <class T> void interleave_pairs(T *to, const T *from, int64_t K, int64_t N) {
    constexpr int64_t P = PAIR<T>;
    for (int64_t k = 0; k < K; k += P)
        for (int64_t n = 0; n < N; n++)
            for (int64_t p = 0; p < P; p++) to[k * N + n * P + p] = from[(k + p) * N + n];
}

// Transpose a block and interleave pairs of rows: [64, D] → [D / PAIR, 64, PAIR].
template <class T> void transpose_paired(T *to, const T *block, int64_t width) {
    constexpr int64_t P = PAIR<T>;
    for (int64_t d = 0; d < width; d += P)
        for (int64_t i = 0; i < BLOCK; i++)
            for (int64_t p = 0; p < P; p++) to[d * BLOCK + i * P + p] = block[i * width + d + p];
}

struct Shape {
    const int32_t *cu_seqlens; // cumulative lengths of documents, from 0
    int64_t documents, queries, keys, width;
    int64_t window; // tokens that a query sees, itself included; 0: no limit
    float scale;    // of scores
    float softcap;  // limit of scores; 0: none

    Shape(const int32_t *cu_seqlens, int64_t documents, int64_t queries, int64_t keys,
          int64_t width, int64_t window, double scale, double softcap)
        : cu_seqlens(cu_seqlens), documents(documents), queries(queries), keys(keys), width(width),
          window(window), scale(scale ? float(scale) : 1 / std::sqrt(float(width))),
          softcap(float(softcap)) {}

    int64_t group() const { return queries / keys; }
    int64_t length(int64_t document) const {
        return cu_seqlens[document + 1] - cu_seqlens[document];
    }
    int64_t blocks(int64_t document) const { return (length(document) + BLOCK - 1) / BLOCK; }
    bool windowed(int64_t document) const { return window && window < length(document); }
    // The first block of keys that block b of queries sees.
    int64_t first(int64_t document, int64_t b) const {
        return windowed(document) ? std::max<int64_t>(0, b * BLOCK - window + 1) / BLOCK : 0;
    }
    // How many blocks of keys the blocks of queries see, all together.
    int64_t pairs(int64_t document) const {
        int64_t count = blocks(document), sum = count * (count + 1) / 2;
        if (windowed(document))
            for (int64_t b = 0; b < count; b++) sum -= first(document, b);
        return sum;
    }
    // The block of keys that is at place n of those of block b: ascending, or from the diagonal
    // block down.
    int64_t block_at(int64_t document, int64_t b, int64_t n) const {
        return windowed(document) ? b - n : n;
    }
    // Mask scores [keys, queries] of block c of keys and block b of queries.
    void mask(float *scores, int64_t document, int64_t b, int64_t c) const {
        constexpr float none = -std::numeric_limits<float>::infinity();
        if (c == b)
            for (int64_t j = 0; j < BLOCK; j++) std::fill_n(scores + j * BLOCK, j, none);
        if (!windowed(document) || (b - c) * BLOCK + BLOCK - 1 < window) return;
        for (int64_t j = 0; j < BLOCK; j++) {
            int64_t seen = std::max<int64_t>(0, window - (b - c) * BLOCK + j); // queries before it
            if (seen < BLOCK) std::fill_n(scores + j * BLOCK + seen, BLOCK - seen, none);
        }
    }
    // Limit a block of scores. `slopes`, if given, become the gradient of limited by unlimited ones.
    void limit(float *scores, float *slopes) const {
        if (!softcap) return;
        float inner = scale / softcap, outer = softcap / scale;
#pragma omp simd
        for (int64_t at = 0; at < BLOCK * BLOCK; at++) {
            float bounded = hyperbolic_tangent(scores[at] * inner);
            scores[at] = bounded * outer;
            if (slopes) slopes[at] = 1 - bounded * bounded;
        }
    }
};

// Call enter(unit), task(unit, head, block) and leave(unit, unshared) for this thread's tasks.
// `unshared`: no other thread has a task of the unit.
template <class Enter, class Task, class Leave>
void for_each_task(const Shape &shape, Enter enter, Task task, Leave leave) {
    int64_t total = 0;
    for (int64_t document = 0; document < shape.documents; document++)
        total += shape.queries * shape.pairs(document);
    Range range = thread_range(total);
    int64_t work = 0;
    for (int64_t document = 0; document < shape.documents; document++) {
        int64_t blocks = shape.blocks(document), unit = shape.group() * shape.pairs(document);
        for (int64_t key = 0; key < shape.keys; key++, work += unit) {
            if (work + unit <= range.begin || work >= range.end) continue;
            int64_t at = work, done = 0;
            for (int64_t head = key * shape.group(); head < (key + 1) * shape.group(); head++)
                for (int64_t block = 0; block < blocks;
                     at += block + 1 - shape.first(document, block), block++)
                    if (range.begin <= at && at < range.end) {
                        if (!done++) enter(document, key);
                        task(document, key, head, block);
                    }
            if (done) leave(document, key, done == shape.group() * blocks);
        }
    }
}

template <class T>
void attention(T *out, float *log_sums, const T *q, const T *k, const T *v,
               const int32_t *cu_seqlens, int64_t documents, int64_t queries, int64_t keys,
               int64_t width, int64_t window, double softmax_scale, double softcap) {
    const Shape shape(cu_seqlens, documents, queries, keys, width, window, softmax_scale, softcap);
    const int64_t tokens = cu_seqlens[documents], area = BLOCK * width;
    const float scale = shape.scale;
#pragma omp parallel
    {
        std::vector<T> k_rows, v_transposed, block(area), packed(area), weights(BLOCK * BLOCK);
        std::vector<float> scores(BLOCK * BLOCK), sums(area);
        auto enter = [&](int64_t document, int64_t key) {
            k_rows.resize(shape.blocks(document) * area);
            v_transposed.resize(k_rows.size());
            for (int64_t b = 0; b < shape.blocks(document); b++) {
                int64_t rows = std::min(BLOCK, shape.length(document) - b * BLOCK);
                int64_t from = ((cu_seqlens[document] + b * BLOCK) * keys + key) * width;
                load_block(k_rows.data() + b * area, k + from, rows, keys * width, width);
                load_block(block.data(), v + from, rows, keys * width, width);
                transpose(v_transposed.data() + b * area, block.data(), width);
            }
        };
        auto task = [&](int64_t document, int64_t, int64_t head, int64_t b) {
            int64_t rows = std::min(BLOCK, shape.length(document) - b * BLOCK);
            int64_t first = cu_seqlens[document] + b * BLOCK;
            load_block(block.data(), q + (first * queries + head) * width, rows, queries * width,
                       width);
            transpose_paired(packed.data(), block.data(), width);
            alignas(64) float top[BLOCK], sum[BLOCK], factor[BLOCK];
            std::fill_n(top, BLOCK, -std::numeric_limits<float>::infinity());
            std::fill_n(sum, BLOCK, 0.0f);
            for (int64_t n = 0; n <= b - shape.first(document, b); n++) {
                int64_t c = shape.block_at(document, b, n);
                float *s = scores.data();
                matmul(BLOCK, BLOCK, width, k_rows.data() + c * area, packed.data(), s, false);
                shape.limit(s, nullptr);
                shape.mask(s, document, b, c);
                std::copy_n(top, BLOCK, factor);
                for (int64_t j = 0; j < BLOCK; j++)
#pragma omp simd
                    for (int64_t i = 0; i < BLOCK; i++) top[i] = std::max(top[i], s[j * BLOCK + i]);
#pragma omp simd
                for (int64_t i = 0; i < BLOCK; i++) {
                    factor[i] = exponential((factor[i] - top[i]) * scale);
                    sum[i] *= factor[i];
                }
                constexpr int64_t P = PAIR<T>;
                for (int64_t j = 0; j < BLOCK; j += P)
#pragma omp simd
                    for (int64_t i = 0; i < BLOCK; i++)
                        for (int64_t p = 0; p < P; p++) {
                            float weight = exponential((s[(j + p) * BLOCK + i] - top[i]) * scale);
                            sum[i] += weight;
                            put(weights[j * BLOCK + i * P + p], weight);
                        }
                if (n)
                    for (int64_t d = 0; d < width; d++)
#pragma omp simd
                        for (int64_t i = 0; i < BLOCK; i++) sums[d * BLOCK + i] *= factor[i];
                matmul(width, BLOCK, BLOCK, v_transposed.data() + c * area, weights.data(),
                       sums.data(), n > 0);
            }
            for (int64_t i = 0; i < rows; i++) {
                T *row = out + ((first + i) * queries + head) * width;
                for (int64_t d = 0; d < width; d++) put(row[d], sums[d * BLOCK + i] / sum[i]);
                log_sums[head * tokens + first + i] = top[i] * scale + std::log(sum[i]);
            }
        };
        for_each_task(shape, enter, task, [](int64_t, int64_t, bool) {});
        at::native::cpublas::brgemm_release(PAIR<T> == 2);
    }
}

template <class T>
void attention_backward(T *grad_q, T *grad_k, T *grad_v, const T *grad, const T *out,
                        const float *log_sums, const T *q, const T *k, const T *v,
                        const int32_t *cu_seqlens, int64_t documents, int64_t queries,
                        int64_t keys, int64_t width, int64_t window, double softmax_scale,
                        double softcap) {
    const Shape shape(cu_seqlens, documents, queries, keys, width, window, softmax_scale, softcap);
    const int64_t tokens = cu_seqlens[documents], area = BLOCK * width;
    const float scale = shape.scale;
    const bool capped = shape.softcap;
    // The sums of a unit that several threads share: gradients by keys, then by values. A thread has
    // at most two.
    struct Part {
        int64_t document, key;
        std::vector<float> sums;
    };
    std::vector<std::vector<Part>> parts;
    auto store = [&](int64_t document, int64_t key, const float *sums) {
        int64_t length = shape.length(document);
        for (T *to : {grad_k, grad_v}) {
            for (int64_t j = 0; j < length; j++) {
                T *row = to + ((cu_seqlens[document] + j) * keys + key) * width;
#pragma omp simd
                for (int64_t d = 0; d < width; d++) put(row[d], sums[j * width + d]);
            }
            sums += shape.blocks(document) * area;
        }
    };
#pragma omp parallel
    {
#pragma omp single
        parts.resize(omp_get_num_threads());
        std::vector<T> k_rows, k_transposed, v_rows, block(area), q_transposed(area),
            q_paired(area), g_transposed(area),
            g_paired(area), weights(BLOCK * BLOCK), slopes(BLOCK * BLOCK),
                slopes_paired(BLOCK * BLOCK);
        std::vector<float> scores(BLOCK * BLOCK), grad_weights(BLOCK * BLOCK), grad_query(area),
            sums, caps(BLOCK * BLOCK);
        auto enter = [&](int64_t document, int64_t key) {
            int64_t blocks = shape.blocks(document);
            for (auto *kept : {&k_rows, &k_transposed, &v_rows}) kept->resize(blocks * area);
            sums.assign(2 * blocks * area, 0);
            for (int64_t b = 0; b < blocks; b++) {
                int64_t rows = std::min(BLOCK, shape.length(document) - b * BLOCK);
                int64_t from = ((cu_seqlens[document] + b * BLOCK) * keys + key) * width;
                load_block(k_rows.data() + b * area, k + from, rows, keys * width, width);
                transpose(k_transposed.data() + b * area, k_rows.data() + b * area, width);
                load_block(v_rows.data() + b * area, v + from, rows, keys * width, width);
            }
        };
        auto task = [&](int64_t document, int64_t, int64_t head, int64_t b) {
            int64_t rows = std::min(BLOCK, shape.length(document) - b * BLOCK);
            int64_t first = cu_seqlens[document] + b * BLOCK;
            int64_t from = (first * queries + head) * width, values = shape.blocks(document) * area;
            load_block(block.data(), q + from, rows, queries * width, width);
            transpose_paired(q_transposed.data(), block.data(), width);
            interleave_pairs(q_paired.data(), block.data(), BLOCK, width);
            load_block(block.data(), grad + from, rows, queries * width, width);
            transpose_paired(g_transposed.data(), block.data(), width);
            interleave_pairs(g_paired.data(), block.data(), BLOCK, width);
            alignas(64) float log_sum[BLOCK], delta[BLOCK];
            for (int64_t i = 0; i < BLOCK; i++) {
                // Queries past the end of the document have weights of 0.
                log_sum[i] = i < rows ? log_sums[head * tokens + first + i]
                                      : std::numeric_limits<float>::infinity();
                float along = 0;
                if (i < rows)
#pragma omp simd reduction(+ : along)
                    for (int64_t d = 0; d < width; d++)
                        along += get(grad[from + i * queries * width + d]) *
                                 get(out[from + i * queries * width + d]);
                delta[i] = along;
            }
            for (int64_t n = 0; n <= b - shape.first(document, b); n++) {
                int64_t c = shape.block_at(document, b, n);
                float *s = scores.data(), *w = grad_weights.data();
                matmul(BLOCK, BLOCK, width, k_rows.data() + c * area, q_transposed.data(), s,
                       false);
                matmul(BLOCK, BLOCK, width, v_rows.data() + c * area, g_transposed.data(), w,
                       false);
                shape.limit(s, caps.data());
                shape.mask(s, document, b, c);
                constexpr int64_t P = PAIR<T>;
                for (int64_t j = 0; j < BLOCK; j += P)
                    for (int64_t p = 0; p < P; p++)
#pragma omp simd
                        for (int64_t i = 0; i < BLOCK; i++) {
                            int64_t at = (j + p) * BLOCK + i;
                            float weight = exponential(s[at] * scale - log_sum[i]);
                            float slope = weight * (w[at] - delta[i]) * scale;
                            if (capped) slope *= caps[at];
                            put(weights[at], weight);
                            put(slopes[at], slope);
                            put(slopes_paired[j * BLOCK + i * P + p], slope);
                        }
                matmul(BLOCK, width, BLOCK, slopes.data(), q_paired.data(),
                       sums.data() + c * area, true);
                matmul(BLOCK, width, BLOCK, weights.data(), g_paired.data(),
                       sums.data() + values + c * area, true);
                matmul(width, BLOCK, BLOCK, k_transposed.data() + c * area, slopes_paired.data(),
                       grad_query.data(), n > 0);
            }
            for (int64_t i = 0; i < rows; i++)
                for (int64_t d = 0; d < width; d++)
                    put(grad_q[from + i * queries * width + d], grad_query[d * BLOCK + i]);
        };
        auto leave = [&](int64_t document, int64_t key, bool unshared) {
            if (unshared)
                store(document, key, sums.data());
            else
                parts[omp_get_thread_num()].push_back({document, key, sums});
        };
        for_each_task(shape, enter, task, leave);
        at::native::cpublas::brgemm_release(PAIR<T> == 2);
    }
    Part *open = nullptr;
    for (auto &thread : parts)
        for (Part &part : thread) {
            if (open && open->document == part.document && open->key == part.key) {
                for (size_t at = 0; at < part.sums.size(); at++) open->sums[at] += part.sums[at];
                continue;
            }
            if (open) store(open->document, open->key, open->sums.data());
            open = &part;
        }
    if (open) store(open->document, open->key, open->sums.data());
}

// ---- The table of kernels

template <class T> bool has_matmul() {
    try {
        std::vector<T> a(BLOCK * BLOCK), b(BLOCK * BLOCK);
        std::vector<float> c(BLOCK * BLOCK);
        matmul(BLOCK, BLOCK, BLOCK, a.data(), b.data(), c.data(), false);
        at::native::cpublas::brgemm_release(PAIR<T> == 2);
        return true;
    } catch (...) { // this processor has no such instructions
        return false;
    }
}

#define BOTH(name)                                                                                 \
    {#name, reinterpret_cast<void *>(&name<float>), reinterpret_cast<void *>(&name<bf16>)}

const struct {
    const char *name;
    void *fp32, *bf16;
} kernels[] = {BOTH(rms_norm),    BOTH(rms_norm_backward), BOTH(rotate),    BOTH(swiglu),
               BOTH(swiglu_backward), BOTH(cross_entropy), BOTH(attention),
                   BOTH(attention_backward),
               BOTH(has_matmul)};

} // namespace

// A kernel by name, for fp32 or bf16; null if there is none.
extern "C" void *kernel(const char *name, int64_t paired) {
    for (auto &entry : kernels)
        if (!std::strcmp(entry.name, name)) return paired ? entry.bf16 : entry.fp32;
    return nullptr;
}
