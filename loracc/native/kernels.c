/* loracc._kernels: the inner loop of a fold, for weights whose change is one product of two factors.

   Optional: where it was not built, or the processor lacks the instructions, loracc.kernel says so and numpy computes
   the same. Only the stable ABI of Python 3.11 is used; nothing here allocates. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*fold_fn)(void *, ptrdiff_t, ptrdiff_t, ptrdiff_t, const void *, const void *, ptrdiff_t);

/* Two dtypes on this processor: their names, columns of a packed panel (0: there is no kernel), bytes of an element. */
typedef struct {
    const char *stored, *sums;
    int stored_bytes, sum_bytes, width;
    fold_fn fold;
} kernel;

static kernel kernels[] = {
    {"bfloat16", "float32", 2, 4, 0, NULL},
    {"bfloat16", "float64", 2, 8, 0, NULL},
    {"float16", "float64", 2, 8, 0, NULL},
    {"float32", "float64", 4, 8, 0, NULL},
};
enum { BF16_FP32, BF16_FP64, FP16_FP64, FP32_FP64, KERNELS };

static kernel *find(const char *stored, const char *sums)
{
    for (int i = 0; i < KERNELS; i++)
        if (strcmp(kernels[i].stored, stored) == 0 && strcmp(kernels[i].sums, sums) == 0)
            return kernels[i].width ? &kernels[i] : NULL;
    return NULL;
}

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(x) CAT(x, INSTANCE)
/* Every loop over the sums of a strip: they are registers only if no index is left at run time. */
#define UNROLL _Pragma("GCC unroll 8")
#define BF16 1
#define FP16 2
#define FP32 3
#define FP64 4
#define USE(kind, instance) (kernels[kind].width = width_##instance, kernels[kind].fold = fold_##instance)
#define USE_ALL(isa) \
    (USE(BF16_FP32, isa##_bf16), USE(BF16_FP64, isa##_bf16_exact), USE(FP16_FP64, isa##_fp16), USE(FP32_FP64, isa##_fp32))

#ifdef __x86_64__

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define ISA(x) avx512_##x
#define VECTOR 64
#define ROWS 6
#define VECS 4
#include "instances.inc"
#undef TARGET
#undef ISA
#undef VECTOR
#undef ROWS
#undef VECS

#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR 32
#define ROWS 4
#define VECS 2

#else /* aarch64 always has fused multiply-adds on vectors */

#define TARGET
#define VECTOR 16
#define ROWS 4
#define VECS 4

#endif

#define ISA(x) plain_##x
#include "instances.inc"

static void choose(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        USE_ALL(avx512);
        return;
    }
#endif
    USE_ALL(plain);
}

#else

static void choose(void) {}

#endif

/* width(stored, sums) -> columns of a panel of the right factor, 0 where there is no kernel. */
static PyObject *width(PyObject *self, PyObject *arguments)
{
    const char *stored, *sums;
    if (!PyArg_ParseTuple(arguments, "ss", &stored, &sums))
        return NULL;
    const kernel *with = find(stored, sums);
    return PyLong_FromLong(with ? with->width : 0);
}

/* fold(stored, sums, weight, offset, rows, columns, stride, left, packed, rank) -> whether every result is finite. */
static PyObject *fold(PyObject *self, PyObject *arguments)
{
    const char *stored, *sums;
    Py_buffer weight, left, packed;
    Py_ssize_t offset, rows, columns, stride, rank;
    if (!PyArg_ParseTuple(arguments, "ssw*nnnny*y*n", &stored, &sums, &weight, &offset, &rows, &columns, &stride, &left,
                          &packed, &rank))
        return NULL;
    const kernel *with = find(stored, sums);
    int finite = -1;
    if (!with)
        PyErr_SetString(PyExc_RuntimeError, "no kernel on this processor");
    else if (offset < 0 || rows < 0 || columns < 0 || rank < 0 || stride < columns)
        PyErr_SetString(PyExc_ValueError, "negative sizes, or rows that overlap");
    else if (rows > 0 && weight.len / with->stored_bytes < offset + (rows - 1) * stride + columns)
        PyErr_SetString(PyExc_ValueError, "the weight's buffer is too short");
    else if (left.len != rows * rank * with->sum_bytes)
        PyErr_SetString(PyExc_ValueError, "the left factor's buffer has another length");
    else if (packed.len != (columns + with->width - 1) / with->width * with->width * rank * with->sum_bytes)
        PyErr_SetString(PyExc_ValueError, "the packed factor's buffer has another length");
    else {
        Py_BEGIN_ALLOW_THREADS
        finite = with->fold((char *)weight.buf + offset * with->stored_bytes, rows, columns, stride, left.buf, packed.buf,
                            rank);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&weight);
    PyBuffer_Release(&left);
    PyBuffer_Release(&packed);
    return finite < 0 ? NULL : PyBool_FromLong(finite);
}

static PyMethodDef methods[] = {
    {"width", width, METH_VARARGS, "Columns of a panel of the right factor, by dtypes; 0 where there is no kernel."},
    {"fold", fold, METH_VARARGS, "weight += left @ right in place, rounded once; whether every result is finite."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    choose();
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "INTERFACE", 2) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
