// y = x w^T for a few rows x, where reading w from memory is the work. The weight is float32 or
// bfloat16, the arithmetic float32. Compiled and called by cpu.py.

#include <cstdint>
#include <cstring>

static inline float to_float(float value) { return value; }

static inline float to_float(uint16_t bfloat16) {  // the upper half of a float32
    uint32_t bits = uint32_t(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// One row of w times ROWS rows of x: each weight is read and converted once.
template <int ROWS, typename T>
static void dot(const T *w, const float *x, float *y, long in, long out) {
    float sum[ROWS] = {};
    for (long i = 0; i < in; i++)
        for (int row = 0; row < ROWS; row++) sum[row] += to_float(w[i]) * x[row * in + i];
    for (int row = 0; row < ROWS; row++) y[row * out] = sum[row];
}

// w: (out, in); x: (rows, in); y: (rows, out); all contiguous.
template <typename T>
static void linear(const T *w, const float *x, float *y, long rows, long in, long out) {
    #pragma omp parallel for
    for (long o = 0; o < out; o++) {
        const T *w_o = w + o * in;
        float *y_o = y + o;
        long row = 0;
        for (; row + 8 <= rows; row += 8) dot<8>(w_o, x + row * in, y_o + row * out, in, out);
        for (; row + 4 <= rows; row += 4) dot<4>(w_o, x + row * in, y_o + row * out, in, out);
        for (; row + 2 <= rows; row += 2) dot<2>(w_o, x + row * in, y_o + row * out, in, out);
        for (; row < rows; row++) dot<1>(w_o, x + row * in, y_o + row * out, in, out);
    }
}

extern "C" void linear_float32(const float *w, const float *x, float *y, long rows, long in,
                               long out) {
    linear(w, x, y, rows, in, out);
}

extern "C" void linear_bfloat16(const uint16_t *w, const float *x, float *y, long rows, long in,
                                long out) {
    linear(w, x, y, rows, in, out);
}
